#!/usr/bin/env bash
# The reference runs, one command a line. Each line runs on its own: copy it, or `bash
# Standard_Training.sh` for all of them, one after the other. The comment behind a line is the
# reference's published result, in percent: NMI, F1, Recall @ k (k as in --k_vals), ResNet50, one
# seed, best epoch on the test classes. No values were published for GoogLeNet and VehicleID, nor for
# ProxyNCA on Online Products and In-Shop, whose more than ten thousand proxies the reference left
# out. The reference has these four losses; python benchmarks/glyphs.py trains every loss there is.
# glyphs is this project's own quick check.
#
# Schedules are the reference script's where its list is known; lines marked * take the schedule of
# the margin run on the same dataset. "Triplet/Softhard" is the sampling now called softhard.
set -e
cd "$(dirname "$0")"

# ---- this project's own check: two minutes, no data, no GPU
python main.py --savename margin --dataset glyphs --gpu -1
python main.py --savename crossentropy --dataset glyphs --loss crossentropy --gpu -1

# ---- CUB200-2011, ResNet50: k = 1 2 4 8
python main.py --savename resnet_margin_distance --dataset cub200 --loss marginloss --sampling distance --n_epochs 50 --tau 30  # 68.2 38.7 63.4 74.9 86.0 90.4
python main.py --savename resnet_triplet_softhard --dataset cub200 --loss triplet --sampling softhard --n_epochs 50 --tau 30    # 66.2 35.5 61.2 73.2 82.4 89.5
python main.py --savename resnet_npair --dataset cub200 --loss npair --n_epochs 55 --tau 35                                     # 65.4 33.8 59.0 71.3 81.1 88.8
python main.py --savename resnet_proxynca --dataset cub200 --loss proxynca --n_epochs 40 --tau 25                               # 68.1 38.1 64.0 75.4 84.2 90.5

# ---- CARS196, ResNet50: k = 1 2 4 8
python main.py --savename resnet_margin_distance --dataset cars196 --loss marginloss --sampling distance --n_epochs 70 --tau 45 # 67.2 37.6 79.3 87.1 92.1 95.4
python main.py --savename resnet_triplet_softhard --dataset cars196 --loss triplet --sampling softhard --n_epochs 70 --tau 45   # 64.4 32.4 75.4 84.2 90.1 94.1
python main.py --savename resnet_npair --dataset cars196 --loss npair --n_epochs 85 --tau 55                                    # 62.3 30.1 69.5 80.2 87.3 92.1
python main.py --savename resnet_proxynca --dataset cars196 --loss proxynca --n_epochs 40 --tau 25                              # 66.3 35.8 80.0 87.2 91.8 95.1

# ---- Stanford Online Products, ResNet50: k = 1 10 100 1000
python main.py --savename resnet_margin_distance --dataset online_products --loss marginloss --sampling distance --n_epochs 40 --tau 30 # 89.6 34.9 76.1 88.7 95.1 98.3
python main.py --savename resnet_triplet_softhard --dataset online_products --loss triplet --sampling softhard --n_epochs 40 --tau 30   # * 89.1 33.7 74.3 87.6 94.9 98.5
python main.py --savename resnet_npair --dataset online_products --loss npair --n_epochs 25 --tau 15 20                                 # 88.8 31.1 70.9 85.2 93.8 98.2

# ---- In-Shop Clothes, ResNet50: k = 1 10 20 30 50
python main.py --savename resnet_margin_distance --dataset in-shop --loss marginloss --sampling distance --n_epochs 40 --tau 25 # 88.2 27.7 84.5 96.1 97.4 97.9 98.5
python main.py --savename resnet_triplet_semihard --dataset in-shop --loss triplet --sampling semihard --n_epochs 40 --tau 25   # * 89.0 30.8 83.9 96.3 97.6 98.4 98.8
python main.py --savename resnet_npair --dataset in-shop --loss npair --n_epochs 40 --tau 25                                    # * 88.0 27.6 80.9 95.0 96.6 97.5 98.2

# ---- PKU VehicleID, ResNet50: k = 1 5, no reference
python main.py --savename resnet_margin_distance --dataset vehicle_id --loss marginloss --sampling distance --n_epochs 40 --tau 25
python main.py --savename resnet_triplet_semihard --dataset vehicle_id --loss triplet --sampling semihard --n_epochs 40 --tau 25
python main.py --savename resnet_npair --dataset vehicle_id --loss npair --n_epochs 40 --tau 25

# ---- Tiny ImageNet, 512 dimensions, batches of 64, as in a published comparison of the two losses (no numbers)
python main.py --savename resnet_triplet_multisimilarity --dataset tiny_imagenet --loss triplet --sampling multisimilarity --embed_dim 512 --bs 64 --n_epochs 150
python main.py --savename resnet_arcface_multisimilarity --dataset tiny_imagenet --loss arcface --sampling multisimilarity --embed_dim 512 --bs 64 --n_epochs 150

# ---- GoogLeNet, 512 dimensions, the same schedules: no reference
python main.py --arch googlenet --savename googlenet_margin_distance --dataset cub200 --loss marginloss --sampling distance --n_epochs 50 --tau 30
python main.py --arch googlenet --savename googlenet_triplet_softhard --dataset cub200 --loss triplet --sampling softhard --n_epochs 50 --tau 30
python main.py --arch googlenet --savename googlenet_npair --dataset cub200 --loss npair --n_epochs 55 --tau 35
python main.py --arch googlenet --savename googlenet_proxynca --dataset cub200 --loss proxynca --n_epochs 40 --tau 25
python main.py --arch googlenet --savename googlenet_margin_distance --dataset cars196 --loss marginloss --sampling distance --n_epochs 70 --tau 45
python main.py --arch googlenet --savename googlenet_triplet_softhard --dataset cars196 --loss triplet --sampling softhard --n_epochs 70 --tau 45
python main.py --arch googlenet --savename googlenet_npair --dataset cars196 --loss npair --n_epochs 85 --tau 55
python main.py --arch googlenet --savename googlenet_proxynca --dataset cars196 --loss proxynca --n_epochs 40 --tau 25
python main.py --arch googlenet --savename googlenet_margin_distance --dataset online_products --loss marginloss --sampling distance --n_epochs 40 --tau 30
python main.py --arch googlenet --savename googlenet_triplet_softhard --dataset online_products --loss triplet --sampling softhard --n_epochs 40 --tau 30
python main.py --arch googlenet --savename googlenet_npair --dataset online_products --loss npair --n_epochs 25 --tau 15 20
python main.py --arch googlenet --savename googlenet_margin_distance --dataset in-shop --loss marginloss --sampling distance --n_epochs 40 --tau 25
python main.py --arch googlenet --savename googlenet_triplet_semihard --dataset in-shop --loss triplet --sampling semihard --n_epochs 40 --tau 25
python main.py --arch googlenet --savename googlenet_npair --dataset in-shop --loss npair --n_epochs 40 --tau 25
python main.py --arch googlenet --savename googlenet_margin_distance --dataset vehicle_id --loss marginloss --sampling distance --n_epochs 40 --tau 25
python main.py --arch googlenet --savename googlenet_triplet_semihard --dataset vehicle_id --loss triplet --sampling semihard --n_epochs 40 --tau 25
python main.py --arch googlenet --savename googlenet_npair --dataset vehicle_id --loss npair --n_epochs 40 --tau 25
