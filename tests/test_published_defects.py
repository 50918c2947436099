"""Which tests hold each known defect of the published code of DSP away (README, "Where this differs")."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
DEFECTS = {
    "Michel on translation sums signed derivatives": [
        "fairseq/michel/test_michel.py:test_importance_is_the_sum_of_absolute_derivatives"
    ],
    "--num_of_heads of the BERT Michel crashes": [
        "hf/scripts/test_scripts.py:test_michel",
        "hf/scripts/test_michel_runs.py:*",
    ],
    "a temperature without gradients, unnoticed": [
        "core/test_session.py:test_schedules_that_cannot_work_are_warned_of_once"
    ],
    "evaluation draws random heads": [
        "core/test_session.py:test_evaluation_uses_exactly_k_heads_and_no_noise",
        "fairseq/training/test_training_output.py:test_validation_scores_the_hard_mask",
        "hf/training/test_trainer.py:test_evaluation_uses_the_hard_mask",
    ],
    "the best checkpoint is one before the target": [
        "fairseq/training/test_training_output.py:test_best_checkpoint_only_once_the_target_is_reached",
        "hf/training/test_trainer.py:test_best_checkpoints_are_among_states_at_target",
    ],
    "gradients that are not finite are stepped with": [
        "core/test_session.py:test_a_gradient_that_is_not_finite_skips_the_gate_step",
        "fairseq/training/test_gate_gradients.py:test_overflow_skips_the_gate_step",
        "hf/training/test_trainer.py:TestBrokenTraining",
    ],
    "another architecture loads without a word": [
        "fairseq/checkpoints/test_loading.py:test_checkpoint_of_another_architecture"
    ],
    "several processes fail, or train the gates with the model's learning rate": [
        "fairseq/training/test_two_ranks.py:test_ranks_agree_with_each_other_and_with_one_process",
        "hf/training/test_two_ranks.py:test_ranks_agree_with_each_other_and_with_one_process",
    ],
    "half precision fails": [
        "fairseq/training/test_gate_gradients.py:test_half_precision_gradients_are_unscaled",
        "fairseq/training/test_resume.py:test_half_precision_run_goes_on",
    ],
    "gates are in every model, also where nothing is pruned": [
        "core/test_methods.py:test_attach_and_detach_leave_the_model_bit_for_bit",
        "core/test_session.py:test_logits_never_reach_the_hosts_optimizer",
    ],
    "the logged loss has the penalty in it": [
        "fairseq/training/test_gate_gradients.py:test_penalty_counts_once_per_micro_batch",
        "fairseq/training/test_training_output.py:test_penalty_falls_in_the_log",
    ],
    "a missing or impossible number of heads or penalty crashes, STE cannot keep all heads": [
        "fairseq/training/test_errors.py:test_bad_options",
        "core/gates/test_top_k.py:test_hard_top_k_keeps_exactly_k_and_the_minima",
        "core/gates/test_top_k.py:test_impossible_counts_are_refused",
    ],
    "the share of closed heads is called that of open ones": [
        "fairseq/training/test_training_output.py:test_log_and_artifacts"
    ],
    "the seed is always 42, only one MNLI set is scored": [
        "hf/scripts/test_scripts.py:test_the_seed_of_the_command_line_counts",
        "hf/scripts/test_scripts.py:test_joint_commands",
    ],
    "CoLA and STS-B crash": ["hf/scripts/test_scripts.py:TestNineTasks"],
    "GLUE is downloaded from where it no longer is": [
        "prepare/test_glue.py:test_all_tasks_of_the_hub_are_written_in_the_official_layout"
    ],
    "one gradient norm over model and gates": [
        "fairseq/training/test_gate_gradients.py:test_clipping_the_model_leaves_the_gates_alone",
        "core/test_session.py:test_clipping_keeps_the_direction",
    ],
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_has_a_test(defect):
    for test in DEFECTS[defect]:
        file, _, name = test.partition(":")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert name == "*" or name in names, test
