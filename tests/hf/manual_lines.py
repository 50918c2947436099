"""The flags of the manual's "BERT on MNLI" command lines, word for word as a shell hands them over."""

import shlex

_TRAIN = """--task_name MNLI --do_train --do_eval --max_seq_length 128 --per_device_train_batch_size 32
    --learning_rate 2e-5 --cache_dir cache/ --save_steps 10000"""

JOINT_DSP = shlex.split(f"""--data_dir data/MNLI/ --model_name_or_path bert-base-uncased {_TRAIN}
    --num_train_epochs 3.0 --output_dir dsp_output/ --num_of_heads 12 --pruning_lr 0.5 --annealing
    --initial_temperature 1000 --final_temperature 1e-8 --cooldown_steps 25000 --joint_pruning""")
STE = shlex.split(f"""--data_dir data/MNLI/ --model_name_or_path bert-base-uncased {_TRAIN} --num_train_epochs 3.0
    --output_dir dsp_output/ --num_of_heads 12 --pruning_lr 0.5 --use_ste --joint_pruning""")
VOITA = shlex.split(f"""--model_name_or_path bert-base-uncased --data_dir data/MNLI/ {_TRAIN} --num_train_epochs 3.0
    --output_dir voita_output/ --l0_penalty 0.0015 --joint_pruning --pruning_lr 0.1""")
FINE_TUNING = shlex.split(f"""--model_name_or_path bert-base-uncased --data_dir data/MNLI/ {_TRAIN}
    --num_train_epochs 3.0 --output_dir output/""")
PIPELINED_DSP = shlex.split(f"""--data_dir data/MNLI/ --model_name_or_path output/ {_TRAIN} --num_train_epochs 1.0
    --output_dir dsp_output/pipelined/ --num_of_heads 12 --pruning_lr 0.5 --annealing --initial_temperature 1000
    --final_temperature 1e-8 --cooldown_steps 8333""")
MICHEL = shlex.split("""--data_dir data/MNLI/ --model_name_or_path output/ --task_name MNLI --output_dir michel_output/
    --cache_dir cache/ --tokenizer_name bert-base-uncased --exact_pruning --num_of_heads 12""")
