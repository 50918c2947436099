"""The flags of the manuals' command lines for MNLI and SQuAD, word for word as a shell hands them over."""

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

_SPD = """--do_train --do_eval --data_dir data/{task}/ --max_seq_length 128 --per_gpu_train_batch_size 32
    --per_gpu_eval_batch_size 32 --evaluate_during_training --overwrite_output_dir"""


def spd_teacher(task: str) -> list[str]:
    """Fine-tuning of the teacher."""
    return shlex.split(f"""--model_name_or_path bert-base-uncased --task_name {task} {_SPD.format(task=task)}
        --learning_rate 3e-5 --num_train_epochs 4.0 --output_dir teacher/{task} --logging_steps 400
        --logging_dir teacher/{task} --save_steps 10000""")


def spd(task: str) -> list[str]:
    """Sparse progressive distillation."""
    return shlex.split(f"""--model_name_or_path teacher/{task} --task_name {task} {_SPD.format(task=task)}
        --do_lower_case --learning_rate 6.4e-4 --save_steps 50 --num_prune_epochs 30 --num_train_epochs 60
        --sparsity 0.9 --output_dir spd/{task} --replacing_rate 0.8 --steps_for_replacing 0
        --scheduler_type linear""")


GPP_TEACHER = shlex.split("""--model_name_or_path bert-unbase-cased --task_name cola --do_train --do_eval
    --max_seq_length 128 --per_gpu_train_batch_size 32 --learning_rate 2e-5 --num_train_epochs 4.0
    --output_dir base/cola""")
GPP = shlex.split("""--model_name_or_path bert-base-uncased --task_name cola --do_distill
    --teacher_model_path base/cola --target_sparsity 0.5 --window_size 3 --logging_steps 50 --eval_steps 50
    --logging_first_step True --prepruning_finetune_epochs 0 --prune_epochs 20 --do_train --do_eval
    --max_seq_length 128 --per_device_train_batch_size 32 --learning_rate 2e-5 --retrain_learning_rate 2e-5
    --num_train_epochs 32 --overwrite_output_dir --output_dir gpp/cola""")

_PLATON = shlex.split("""--pruner_name PLATON --initial_threshold 1 --final_threshold 0.10 --warmup_steps 5400
    --initial_warmup 1 --final_warmup 5 --beta1 0.85 --beta2 0.950 --deltaT 10 --num_train_epochs 10 --seed 9
    --learning_rate 3e-5 --per_gpu_train_batch_size 16 --per_gpu_eval_batch_size 256 --do_train --do_eval
    --do_lower_case""")
_SQUAD = shlex.split("""--logging_steps 300 --eval_steps 3000 --save_steps 100000 --data_dir data/squad
    --output_dir log/deberta-v3-base/PLATON/ --overwrite_output_dir""")
PLATON_BERT = [*_PLATON, *shlex.split("--model_type bert --model_name_or_path bert-base-uncased"), *_SQUAD]
PLATON_DEBERTA = [
    *_PLATON,
    *shlex.split("--model_type deberta --model_name_or_path microsoft/deberta-v3-base"),
    *_SQUAD,
]
