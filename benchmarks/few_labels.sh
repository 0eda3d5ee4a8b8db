#!/usr/bin/env bash
# The table "Few labels" of RESULTS.md: the network in the package by a linear classifier and fine-tuned, and the same
# fine-tuning from random weights, with 1 % (ten seeds, and three from random weights), 10 % and all of the labels (three
# seeds). Results go to the folder that is given. About two hours on one CPU core.
#   bash benchmarks/few_labels.sh FOLDER
set -euo pipefail
folder=${1:?give a folder for the results}
network=slimclr_resnet20.mocov3_fashionmnist
# Garments fill these images, so that small crops of them are of no class.
tune=(python recipes/finetune.py --augment.crop_min 0.9 --augment.color_jitter 0 --augment.label_smoothing 0)
for share in 0.01 0.1 1; do
    case "$share" in
        0.01) epochs=50 lr=0.0001 seeds=10 ;;
        0.1) epochs=20 lr=0.001 seeds=3 ;;
        1) epochs=10 lr=0.001 seeds=3 ;;
    esac
    # Statistics of batches of so few images would be noisy.
    frozen=$([ "$share" = 1 ] && echo false || echo true)
    common=(--data.train_share "$share" --optim.epochs "$epochs")
    python recipes/linear_eval.py --network "$network" --data.train_share "$share" --seeds "$seeds" \
        --features.cache "$folder/cache" --run.output "$folder/linear-$share"
    "${tune[@]}" "${common[@]}" --network "$network" --seeds "$seeds" --optim.lr "$lr" --model.frozen_norm "$frozen" \
        --run.output "$folder/fine-tuned-$share"
    "${tune[@]}" "${common[@]}" --network "random weights of $network" --seeds 3 --optim.lr 0.003 \
        --run.output "$folder/random-$share"
done
