#!/usr/bin/env bash
# The table "Few labels" of RESULTS.md: the network in the package by a linear classifier and fine-tuned, and the same
# fine-tuning from random weights, with 1 % and 10 % of the labels and three seeds; and once with all labels. Results go to the folder that is given.
#   bash benchmarks/few_labels.sh FOLDER
set -euo pipefail
folder=${1:?give a folder for the results}
network=slimclr_resnet20.mocov3_fashionmnist
for share in 0.01 0.1; do
    epochs=$([ "$share" = 0.01 ] && echo 50 || echo 20)
    common=(--data.train_share "$share" --seeds 3)
    tune=(python recipes/finetune.py "${common[@]}" --optim.epochs "$epochs")
    python recipes/linear_eval.py --network "$network" "${common[@]}" --features.cache "$folder/cache" \
        --run.output "$folder/linear-$share"
    "${tune[@]}" --network "$network" --optim.lr 0.001 --run.output "$folder/fitted-$share"
    for start in "$network" "random weights of $network"; do
        "${tune[@]}" --network "$start" --optim.lr 0.003 --model.fit_head false --run.output "$folder/${start%% *}-$share"
    done
done
python recipes/linear_eval.py --network "$network" --features.cache "$folder/cache" --run.output "$folder/linear-all"
python recipes/finetune.py --network "$network" --optim.epochs 8 --optim.lr 0.001 --run.output "$folder/fitted-all"
