#!/usr/bin/env bash
# Everything behind RESULTS.md: trains, evaluates and analyses ten small networks for each seed, then prints the tables. Finished steps
# are not repeated. Figures are of the first seed.
#
#   bash benchmarks/small_scale.sh FOLDER [SEED ...]
#   COLLAPSE=1 bash benchmarks/small_scale.sh FOLDER [SEED ...]     # and those without warm-up, on 60,000 images
#   TEACHERS=1 bash benchmarks/small_scale.sh FOLDER [SEED ...]     # and those that learn from width 1.0 alone
#
# FASHION_MNIST is the folder of the data set's files: Debian's (apt-get install dataset-fashion-mnist) or torchvision's.
# A seed takes about three hours on one CPU core. What is interrupted goes on by the same command.
set -euo pipefail
out=${1:?give a folder for the runs}
seeds=${*:2}
seeds=${seeds:-0 1 2}
judge=(accelerate launch -q recipes/linear_eval.py --data.name fashion-mnist --features.train_images 12000 --optim.epochs 20
  --optim.lr "[0.03, 0.1, 0.3, 1.0, 3.0]" --data.root "${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}")
pretrain=(accelerate launch -q recipes/pretrain.py --resume auto --run.output "$out"
  --data.root "${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}")
first=${seeds%% *}
self_supervised=(alone_w100 vanilla slow slow_kd slimclr)
supervised=(supervised_w100 supervised)

"${judge[@]}" --network "raw pixels" --run.output "$out/raw_pixels"
for seed in $seeds; do
  for recipe in "${self_supervised[@]}" alone_w075 alone_w050 alone_w025 "${supervised[@]}"; do
    run=$out/$recipe-$seed
    [ -e "$run/model.safetensors" ] || "${pretrain[@]}" \
      --config "recipes/configs/small_scale/$recipe.yaml" --run.name "$recipe-$seed" --run.seed "$seed"
    "${judge[@]}" --network "$run"
  done
  "${judge[@]}" --network "$out/slimclr-$seed" --probe.head slimmable
  for head in switchable slimmable; do
    "${judge[@]}" --network "$out/slimclr-$seed" --probe.head "$head" --features.standardise false \
      --optim.lr "[0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]" --run.output "$out/unstandardised_$head-$seed/linear_eval"
  done
  "${judge[@]}" --network "random weights of $out/slimclr-$seed" --run.output "$out/random_weights-$seed/linear_eval" --run.seed "$seed"
  python recipes/analyze.py condition "$out/slimclr-$seed"
  python recipes/analyze.py gradients $(printf "$out/%s-$seed " "${self_supervised[@]}" "${supervised[@]}") \
    --output "$out/analysis-$seed"
  for pair in "alone_w100 vanilla slimclr" "supervised_w100 supervised"; do
    python recipes/analyze.py trajectory $(printf "$out/%s-$seed " $pair) --output "$out/analysis-$seed"
  done
done
for pair in "alone_w100 vanilla slimclr" "supervised_w100 supervised"; do
  python recipes/analyze.py surface $(printf "$out/%s-$first " $pair) --resolution 11 --output "$out/analysis-$first"
done
# gradient_imbalance.png and gradient_divergence.png: six of the runs, side by side as in the paper.
python recipes/analyze.py gradients \
  $(printf "$out/%s-$first " alone_w100 vanilla supervised slow slow_kd slimclr) --output "$out/figures"
if [ -n "${COLLAPSE:-}" ]; then
  for seed in $seeds; do
    for rate in 0.03 0.06; do
      for slow in 0 0.5; do
        run=collapse-lr$rate-slow$slow-$seed
        [ -e "$out/$run/model.safetensors" ] || "${pretrain[@]}" --run.name "$run" --run.seed "$seed" \
          --config recipes/configs/small_scale/collapse.yaml --optim.lr "$rate" --method.slow_start_epochs "$slow"
      done
    done
  done
fi
if [ -n "${TEACHERS:-}" ]; then
  for seed in $seeds; do
    for recipe in seed compress disco bingo; do
      run=$out/$recipe-$seed
      [ -e "$run/model.safetensors" ] || "${pretrain[@]}" --config "recipes/configs/small_scale/$recipe.yaml" \
        --run.name "$recipe-$seed" --run.seed "$seed" --teacher.network "$out/alone_w100-$seed"
      "${judge[@]}" --network "$run"
    done
  done
fi
python benchmarks/small_scale.py "$out"
