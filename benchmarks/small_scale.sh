#!/usr/bin/env bash
# Everything behind RESULTS.md: trains, judges and analyses ten small networks for each seed, then prints the tables. What is
# there already is not done again.
#
#   bash benchmarks/small_scale.sh FOLDER [SEED ...]
#
# FASHION_MNIST is the folder of the data set's files: Debian's (apt-get install dataset-fashion-mnist) or torchvision's.
set -euo pipefail
out=${1:?give a folder for the runs}
seeds=${*:2}
seeds=${seeds:-0 1 2}
judge=(accelerate launch -q recipes/linear_eval.py --data.name fashion-mnist --features.train_images 12000 --optim.epochs 20
  --optim.lr "[0.1, 0.3, 1.0]" --data.root "${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}")
self_supervised=(alone_w100 vanilla slow slow_kd slimclr)
supervised=(supervised_w100 supervised)

for seed in $seeds; do
  for recipe in "${self_supervised[@]}" alone_w075 alone_w050 alone_w025 "${supervised[@]}"; do
    run=$out/$recipe-$seed
    [ -e "$run/model.safetensors" ] || accelerate launch -q recipes/pretrain.py --resume auto \
      --config "recipes/configs/small_scale/$recipe.yaml" --run.output "$out" --run.name "$recipe-$seed" --run.seed "$seed"
    "${judge[@]}" --network "$run"
  done
  "${judge[@]}" --network "$out/slimclr-$seed" --probe.head slimmable
  accelerate launch -q recipes/analyze.py condition "$out/slimclr-$seed"
  accelerate launch -q recipes/analyze.py gradients $(printf "$out/%s-$seed " "${self_supervised[@]}" "${supervised[@]}") \
    --output "$out/analysis-$seed"
  for pair in "alone_w100 vanilla slimclr" "supervised_w100 supervised"; do
    accelerate launch -q recipes/analyze.py trajectory $(printf "$out/%s-$seed " $pair) --output "$out/analysis-$seed"
  done
done
for pair in "alone_w100 vanilla slimclr" "supervised_w100 supervised"; do
  accelerate launch -q recipes/analyze.py surface $(printf "$out/%s-${seeds%% *} " $pair) --resolution 11 --batches 2 \
    --output "$out/analysis-${seeds%% *}"
done
python benchmarks/small_scale.py "$out"
