#!/usr/bin/env bash
# All recipes of recipes.csv, one command a line. Each line runs on its own: copy it, or `bash
# Standard_Training.sh` for all of them, one after the other. A run ends with a verdict, measured
# beside published values; add any flag to override the recipe, and the verdict lists it. The
# comment behind a line is what was published, in percent. python main.py --recipes lists the same
# with the sources; README, "Recipes", says what a verdict is.
set -e
cd "$(dirname "$0")"

# ---- this project's own check, with its own record: minutes, no data, no GPU
python main.py --recipe glyphs/margin --seeds 0 1 2  # 87.92±1.60 71.51±3.41 91.78±0.55 96.61±0.28 98.88±0.40 99.77±0.09
python main.py --recipe glyphs/crossentropy

# ---- CUB200-2011, ResNet50, 1 seed: NMI, F1, Recall @ 1 2 4 8
python main.py --recipe cub200/margin-distance   # 68.2 38.7 63.4 74.9 86.0 90.4
python main.py --recipe cub200/triplet-softhard  # 66.2 35.5 61.2 73.2 82.4 89.5
python main.py --recipe cub200/npair             # 65.4 33.8 59.0 71.3 81.1 88.8
python main.py --recipe cub200/proxynca          # 68.1 38.1 64.0 75.4 84.2 90.5

# ---- CARS196, ResNet50, 1 seed: NMI, F1, Recall @ 1 2 4 8
python main.py --recipe cars196/margin-distance   # 67.2 37.6 79.3 87.1 92.1 95.4
python main.py --recipe cars196/triplet-softhard  # 64.4 32.4 75.4 84.2 90.1 94.1
python main.py --recipe cars196/npair             # 62.3 30.1 69.5 80.2 87.3 92.1
python main.py --recipe cars196/proxynca          # 66.3 35.8 80.0 87.2 91.8 95.1

# ---- Stanford Online Products, ResNet50, 1 seed: NMI, F1, Recall @ 1 10 100 1000; ProxyNCA without a reference
python main.py --recipe online_products/margin-distance   # 89.6 34.9 76.1 88.7 95.1 98.3
python main.py --recipe online_products/triplet-softhard  # 89.1 33.7 74.3 87.6 94.9 98.5
python main.py --recipe online_products/npair             # 88.8 31.1 70.9 85.2 93.8 98.2
python main.py --recipe online_products/proxynca

# ---- In-Shop Clothes, ResNet50, 1 seed: NMI, F1, Recall @ 1 10 20 30 50; ProxyNCA without a reference
python main.py --recipe in-shop/margin-distance   # 88.2 27.7 84.5 96.1 97.4 97.9 98.5
python main.py --recipe in-shop/triplet-semihard  # 89.0 30.8 83.9 96.3 97.6 98.4 98.8
python main.py --recipe in-shop/npair             # 88.0 27.6 80.9 95.0 96.6 97.5 98.2
python main.py --recipe in-shop/proxynca

# ---- PKU VehicleID, ResNet50: no reference
python main.py --recipe vehicle_id/margin-distance
python main.py --recipe vehicle_id/triplet-semihard
python main.py --recipe vehicle_id/npair

# ---- Tiny ImageNet, ResNet50, 512 dimensions: no reference
python main.py --recipe tiny_imagenet/triplet-multisimilarity
python main.py --recipe tiny_imagenet/arcface-multisimilarity

# ---- GoogLeNet, 512 dimensions: no published results
python main.py --recipe cub200/googlenet-margin-distance
python main.py --recipe cub200/googlenet-triplet-semihard
python main.py --recipe cub200/googlenet-npair
python main.py --recipe cub200/googlenet-proxynca
python main.py --recipe cars196/googlenet-margin-distance
python main.py --recipe cars196/googlenet-triplet-semihard
python main.py --recipe cars196/googlenet-npair
python main.py --recipe cars196/googlenet-proxynca
python main.py --recipe online_products/googlenet-margin-distance
python main.py --recipe online_products/googlenet-triplet-semihard
python main.py --recipe online_products/googlenet-npair
python main.py --recipe in-shop/googlenet-margin-distance
python main.py --recipe in-shop/googlenet-triplet-semihard
python main.py --recipe in-shop/googlenet-npair
python main.py --recipe vehicle_id/googlenet-margin-distance
python main.py --recipe vehicle_id/googlenet-triplet-semihard
python main.py --recipe vehicle_id/googlenet-npair

# ---- CUB200-2011, ResNet50, Roth et al. 2020, 5 seeds: Recall @ 1, mean±standard deviation
python main.py --recipe cub200/rev-angular --seeds 0 1 2 3 4                    # 62.10±0.27
python main.py --recipe cub200/rev-arcface --seeds 0 1 2 3 4                    # 62.67±0.67
python main.py --recipe cub200/rev-contrastive-distance --seeds 0 1 2 3 4       # 61.50±0.17
python main.py --recipe cub200/rev-lifted --seeds 0 1 2 3 4                     # 59.59±0.60
python main.py --recipe cub200/rev-histogram --seeds 0 1 2 3 4                  # 60.55±0.26
python main.py --recipe cub200/rev-margin-distance-beta0.6 --seeds 0 1 2 3 4    # 62.50±0.24
python main.py --recipe cub200/rev-margin-distance-beta1.2 --seeds 0 1 2 3 4    # 63.09±0.46
python main.py --recipe cub200/rev-multisimilarity --seeds 0 1 2 3 4            # 62.80±0.70
python main.py --recipe cub200/rev-npair --seeds 0 1 2 3 4                      # 61.63±0.58
python main.py --recipe cub200/rev-proxynca --seeds 0 1 2 3 4                   # 62.80±0.48
python main.py --recipe cub200/rev-quadruplet-distance --seeds 0 1 2 3 4        # 61.71±0.63
python main.py --recipe cub200/rev-snr-distance --seeds 0 1 2 3 4               # 62.88±0.18
python main.py --recipe cub200/rev-softtriple --seeds 0 1 2 3 4                 # 60.83±0.47
python main.py --recipe cub200/rev-softmax --seeds 0 1 2 3 4                    # 61.66±0.33
python main.py --recipe cub200/rev-triplet-distance --seeds 0 1 2 3 4           # 62.87±0.35
python main.py --recipe cub200/rev-triplet-random --seeds 0 1 2 3 4             # 58.48±0.31
python main.py --recipe cub200/rev-triplet-semihard --seeds 0 1 2 3 4           # 60.09±0.49
python main.py --recipe cub200/rev-triplet-softhard --seeds 0 1 2 3 4           # 61.61±0.21
python main.py --recipe cub200/rev-r-contrastive-distance --seeds 0 1 2 3 4     # 63.57±0.66
python main.py --recipe cub200/rev-r-margin-distance-beta0.6 --seeds 0 1 2 3 4  # 64.93±0.42
python main.py --recipe cub200/rev-r-margin-distance-beta1.2 --seeds 0 1 2 3 4  # 63.32±0.33
python main.py --recipe cub200/rev-r-snr-distance --seeds 0 1 2 3 4             # 62.97±0.32
python main.py --recipe cub200/rev-r-triplet-distance --seeds 0 1 2 3 4         # 63.28±0.18

# ---- CARS196, ResNet50, Roth et al. 2020, 5 seeds: Recall @ 1, mean±standard deviation
python main.py --recipe cars196/rev-angular --seeds 0 1 2 3 4                    # 78.00±0.32
python main.py --recipe cars196/rev-arcface --seeds 0 1 2 3 4                    # 79.16±0.97
python main.py --recipe cars196/rev-contrastive-distance --seeds 0 1 2 3 4       # 75.78±0.39
python main.py --recipe cars196/rev-lifted --seeds 0 1 2 3 4                     # 72.17±0.38
python main.py --recipe cars196/rev-histogram --seeds 0 1 2 3 4                  # 76.47±0.38
python main.py --recipe cars196/rev-margin-distance-beta0.6 --seeds 0 1 2 3 4    # 77.70±0.32
python main.py --recipe cars196/rev-margin-distance-beta1.2 --seeds 0 1 2 3 4    # 79.86±0.33
python main.py --recipe cars196/rev-multisimilarity --seeds 0 1 2 3 4            # 81.68±0.19
python main.py --recipe cars196/rev-npair --seeds 0 1 2 3 4                      # 77.48±0.28
python main.py --recipe cars196/rev-proxynca --seeds 0 1 2 3 4                   # 78.48±0.58
python main.py --recipe cars196/rev-quadruplet-distance --seeds 0 1 2 3 4        # 76.34±0.27
python main.py --recipe cars196/rev-snr-distance --seeds 0 1 2 3 4               # 78.69±0.19
python main.py --recipe cars196/rev-softtriple --seeds 0 1 2 3 4                 # 75.66±0.46
python main.py --recipe cars196/rev-softmax --seeds 0 1 2 3 4                    # 78.91±0.27
python main.py --recipe cars196/rev-triplet-distance --seeds 0 1 2 3 4           # 79.13±0.27
python main.py --recipe cars196/rev-triplet-random --seeds 0 1 2 3 4             # 70.63±0.43
python main.py --recipe cars196/rev-triplet-semihard --seeds 0 1 2 3 4           # 72.51±0.47
python main.py --recipe cars196/rev-triplet-softhard --seeds 0 1 2 3 4           # 77.60±0.33
python main.py --recipe cars196/rev-r-contrastive-distance --seeds 0 1 2 3 4     # 81.06±0.41
python main.py --recipe cars196/rev-r-margin-distance-beta0.6 --seeds 0 1 2 3 4  # 82.37±0.13
python main.py --recipe cars196/rev-r-margin-distance-beta1.2 --seeds 0 1 2 3 4  # 81.11±0.49
python main.py --recipe cars196/rev-r-snr-distance --seeds 0 1 2 3 4             # 80.38±0.35
python main.py --recipe cars196/rev-r-triplet-distance --seeds 0 1 2 3 4         # 81.17±0.11

# ---- Stanford Online Products, ResNet50, Roth et al. 2020, 5 seeds: Recall @ 1, mean±standard deviation
python main.py --recipe online_products/rev-angular --seeds 0 1 2 3 4                    # 73.22±0.07
python main.py --recipe online_products/rev-arcface --seeds 0 1 2 3 4                    # 77.71±0.15
python main.py --recipe online_products/rev-contrastive-distance --seeds 0 1 2 3 4       # 73.21±0.04
python main.py --recipe online_products/rev-lifted --seeds 0 1 2 3 4                     # 75.21±0.12
python main.py --recipe online_products/rev-histogram --seeds 0 1 2 3 4                  # 71.30±0.10
python main.py --recipe online_products/rev-margin-distance-beta0.6 --seeds 0 1 2 3 4    # 77.38±0.11
python main.py --recipe online_products/rev-margin-distance-beta1.2 --seeds 0 1 2 3 4    # 78.43±0.07
python main.py --recipe online_products/rev-multisimilarity --seeds 0 1 2 3 4            # 77.99±0.09
python main.py --recipe online_products/rev-npair --seeds 0 1 2 3 4                      # 75.86±0.08
python main.py --recipe online_products/rev-quadruplet-distance --seeds 0 1 2 3 4        # 76.95±0.10
python main.py --recipe online_products/rev-snr-distance --seeds 0 1 2 3 4               # 77.61±0.34
python main.py --recipe online_products/rev-softmax --seeds 0 1 2 3 4                    # 76.92±0.64
python main.py --recipe online_products/rev-triplet-distance --seeds 0 1 2 3 4           # 77.39±0.15
python main.py --recipe online_products/rev-triplet-random --seeds 0 1 2 3 4             # 67.86±0.14
python main.py --recipe online_products/rev-triplet-semihard --seeds 0 1 2 3 4           # 73.61±0.14
python main.py --recipe online_products/rev-triplet-softhard --seeds 0 1 2 3 4           # 73.50±0.09
python main.py --recipe online_products/rev-r-contrastive-distance --seeds 0 1 2 3 4     # 74.36±0.11
python main.py --recipe online_products/rev-r-margin-distance-beta0.6 --seeds 0 1 2 3 4  # 77.58±0.11
python main.py --recipe online_products/rev-r-margin-distance-beta1.2 --seeds 0 1 2 3 4  # 78.52±0.10
python main.py --recipe online_products/rev-r-snr-distance --seeds 0 1 2 3 4             # 77.69±0.25
python main.py --recipe online_products/rev-r-triplet-distance --seeds 0 1 2 3 4         # 77.33±0.14
