"""Rounds that remove heads of a trained translation model by their importance (Michel et al. 2019)."""

import copy
import logging
import os
import sys
from pathlib import Path
from typing import Collection, Optional

import numpy as np
import torch
from fairseq import options, scoring, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.scoring.chrf import ChrFScorer
from omegaconf import DictConfig, open_dict
from tqdm import tqdm

from head_pruning import HeadMask, HeadPruningError
from head_pruning.files import alone_in
from head_pruning.gates import GateBank
from head_pruning.importance import ImportanceAccumulator, normalize_importance, pruning_rounds
from head_pruning.importance.michel import macs_words
from head_pruning.importance.rounds import MASKS_FOLDER, ROUNDS_FILE, RoundsReport
from head_pruning.progress import bar_options
from head_pruning.report.tables import head_table, text_table
from head_pruning.surgery.per_unit import unit_macs
from head_pruning.unit_map import NUMBERED

from ..modules.attention import UnfusedAttention
from ..modules.unit_map import unit_map
from ..patches import sentence_of
from .loading import data_found, load_translator
from .settings import SCORE_BEAM, check_counts, check_score_at, flags, read_score_at, refuse_pruners, settings

#: How people write what ``--scoring`` measures.
METRICS = {"bleu": "BLEU", "sacrebleu": "sacreBLEU", "chrf": "chrF"}

logger = logging.getLogger("fairseq_plugin.run_michel")


def get_parser():
    """fairseq-train's and fairseq-generate's flags, and those of this command."""
    parser = options.get_training_parser()
    options.add_generation_args(parser)
    # fairseq's parser needs an architecture; the checkpoint's is used. All sentences are scored, as the plugin's
    # fairseq-generate decodes them.
    parser.set_defaults(arch="transformer", required_batch_size_multiple=1)
    group = parser.add_argument_group("Michel pruning")
    group.add_argument("--num-of-heads", type=int, default=4, help="heads to remove per round (default: %(default)s)")
    group.add_argument(
        "--macs-per-round",
        type=float,
        help="share of the multiply-accumulates of all heads and units to remove per round, in the place of "
        "--num-of-heads",
    )
    group.add_argument(
        "--macs-length",
        type=int,
        default=128,
        help="tokens of a sentence, where these are counted (default: %(default)s)",
    )
    group.add_argument("--exact-pruning", action="store_true", help="measure the importance anew after every round")
    group.add_argument(
        "--signed-importance",
        action="store_true",
        help="sum the derivatives with their signs, as the published fairseq code does; default: absolute values",
    )
    group.add_argument(
        "--prune-units",
        choices=NUMBERED,
        default="heads",
        help="what is removed: heads, ffn (the units of feed-forward blocks) or both, by one ranking",
    )
    group.add_argument("--subset", type=int, help="a quick look: both numbers of sentences below")
    group.add_argument("--importance-sentences", type=int, help="training sentences per importance (default: all)")
    group.add_argument("--score-sentences", type=int, help="test sentences that score a round (default: all)")
    group.add_argument("--score-at", help="head counts, such as 18,9,4, to score on the whole test set as well")
    group.add_argument("--score-beam", type=int, default=SCORE_BEAM, help="beam of --score-at (default: %(default)s)")
    return parser


class MichelRun:
    """A trained model with gates on it, its training data for importance and its test data for scores."""

    def __init__(self, cfg: DictConfig, args) -> None:
        self.cfg, self.args = cfg, args
        self.metric = METRICS.get(cfg.scoring._name, cfg.scoring._name)
        self.model, saved, self.task = load_translator(cfg.checkpoint.restore_file, cfg.task.data)
        self.criterion = self.task.build_criterion(saved.criterion)
        self.device = torch.device("cuda" if torch.cuda.is_available() and not cfg.common.cpu else "cpu")
        if cfg.common.fp16:
            self.model.half()
        self.model.to(self.device).eval().requires_grad_(False)
        self.unit_map = unit_map(self.model).numbering(args.prune_units).told()
        UnfusedAttention(self.model).attach()  # for good: the model is this run's own
        self.gates = GateBank(self.model, self.unit_map)
        self.gates.attach()
        self.accumulator = ImportanceAccumulator(self.gates, signed=args.signed_importance)
        with open_dict(saved):
            saved.task.data = cfg.task.data
        with data_found(cfg.task.data):
            self.task.load_dataset(cfg.dataset.gen_subset, task_cfg=saved.task)
        self._scorer()  # one that cannot be made is refused now, not after a decoding
        # Before any scoring: words that scoring adds to the target dictionary must not enter the generators.
        self.generators = {}
        for beam in {cfg.generation.beam, args.score_beam}:
            generation = copy.deepcopy(cfg.generation)
            with open_dict(generation):
                generation.beam = beam
            self.generators[beam] = self.task.build_generator([self.model], generation)
        self.epoch = 0
        self.read = 0, 0  # sentences of the last pass over a split, and of the split

    def batches(self, split: str, sentences: Optional[int], shuffle: bool, title: str, multiple: int = 1):
        """Batches of ``split`` with progress, up to a number of sentences; a last one that is no multiple is lost."""
        if split not in self.task.datasets:
            with data_found(self.cfg.task.data):
                self.task.load_dataset(split)
        dataset = self.task.dataset(split)
        cfg = self.cfg.dataset
        iterator = self.task.get_batch_iterator(
            dataset=dataset,
            max_tokens=cfg.max_tokens if cfg.max_tokens or cfg.batch_size else 4096,
            max_sentences=cfg.batch_size,
            max_positions=utils.resolve_max_positions(self.task.max_positions(), self.model.max_positions()),
            ignore_invalid_inputs=True,
            required_batch_size_multiple=multiple,
            seed=self.cfg.common.seed,
            epoch=max(1, self.epoch),
            disable_iterator_cache=True,
        ).next_epoch_itr(shuffle=shuffle)
        wanted = min(sentences or len(dataset), len(dataset))
        seen = 0
        with tqdm(total=wanted, desc=title, unit="sent", leave=False, **bar_options()) as bar:
            for sample in iterator:
                if not sample or "net_input" not in sample:
                    continue
                if seen >= wanted:
                    break
                seen += len(sample["id"])
                bar.update(len(sample["id"]))
                yield utils.move_to_cuda(sample) if self.device.type == "cuda" else sample
        if not seen:
            raise HeadPruningError(
                f"The model can read no sentence of {split} in {self.cfg.task.data}: they are too long for it, or "
                "there is none, or fewer than --required-batch-size-multiple; name other data."
            )
        self.read = seen, len(dataset)

    def importance(self, mask: HeadMask) -> np.ndarray:
        """Normalised importance of all heads, over the training set in a new shuffle."""
        self.epoch += 1
        with self.accumulator.probing(mask), torch.enable_grad():
            limit = self.args.importance_sentences or self.args.subset
            for sample in self.batches(self.cfg.dataset.train_subset, limit, True, "importance"):
                loss, _, _ = self.criterion(self.model, sample)
                loss.backward()
                self.accumulator.add()
            self.gates.check_fired()
        return normalize_importance(self.accumulator.scores(), self.unit_map)

    def score(self, mask: HeadMask, sentences: Optional[int] = None, beam: Optional[int] = None) -> float:
        """What ``--scoring`` gives on the test set with ``mask``."""
        self.gates.set_evaluation(mask.keep)
        generator = self.generators[beam or self.cfg.generation.beam]
        target = self.task.target_dictionary
        scorer = self._scorer()
        title, multiple = f"{self.metric} at {mask.kept} heads", self.cfg.dataset.required_batch_size_multiple
        for sample in self.batches(self.cfg.dataset.gen_subset, sentences, False, title, multiple):
            hypotheses = self.task.inference_step(generator, [self.model], sample)
            for hypothesis, reference in zip(hypotheses, sample["target"]):
                self._add(scorer, target, reference, hypothesis[0]["tokens"])
        if isinstance(scorer, ChrFScorer):  # fairseq's asks the line that it formats for the score
            return float(scorer.sacrebleu.corpus_chrf(scorer.pred, [scorer.ref]).score)
        return float(scorer.score())

    def _scorer(self):
        """A new one, since most of fairseq's cannot be emptied."""
        try:
            return scoring.build_scorer(self.cfg.scoring, self.task.target_dictionary)
        except ImportError as error:
            raise HeadPruningError(
                f"--scoring {self.cfg.scoring._name} needs a package that is not installed ({error}); install it, or "
                "choose another."
            ) from error

    def _add(self, scorer, target, reference: torch.Tensor, hypothesis: torch.Tensor) -> None:
        # As fairseq-generate scores: words, not pieces, when BPE is removed.
        post_process = self.cfg.common_eval.post_process
        reference = utils.strip_pad(reference, target.pad()).int().cpu()
        hypothesis = hypothesis.int().cpu()
        if hasattr(scorer, "add_string"):
            text = target.string(reference, post_process, escape_unk=True)
            scorer.add_string(text, target.string(hypothesis, post_process))
            return
        if post_process:
            text = target.string(reference, post_process, escape_unk=True)
            reference = target.encode_line(text, add_if_not_exist=True)
            hypothesis = target.encode_line(target.string(hypothesis, post_process), add_if_not_exist=True)
        scorer.add(reference, hypothesis)


def run(args) -> list[dict]:
    """All rounds; returns and saves one entry per round.

    Raises:
        HeadPruningError: a count is not possible, the folder holds a run of other settings, the checkpoint is damaged,
            pruned or no translation model's, or its data are not there.
    """
    check_counts(args)
    refuse_pruners(args)
    score_at = read_score_at(args.score_at)
    cfg = convert_namespace_to_omegaconf(args)
    run = MichelRun(cfg, args)
    if args.macs_per_round is None:
        check_score_at(score_at, run.unit_map, args.num_of_heads)
    with alone_in(cfg.checkpoint.save_dir):
        return _all_rounds(run, score_at)


def _all_rounds(run: MichelRun, score_at: Collection[int]) -> list[dict]:
    cfg, args = run.cfg, run.args
    folder = Path(cfg.checkpoint.save_dir)
    cure = f"choose another --save-dir, or remove {ROUNDS_FILE} and {MASKS_FOLDER}/ from this one"
    report = RoundsReport(folder, settings(cfg, args, score_at), run.unit_map, flags=flags(), cure=cure)
    if report.finished:
        logger.info("all rounds were finished before; nothing is measured anew")
    elif report.start is not None:
        logger.info("going on after the round that left %d heads", report.start.mask.kept)
        run.epoch = len(report.entries) - 1
    by_macs = args.macs_per_round is not None
    macs = unit_macs(run.model, run.unit_map, args.macs_length) if by_macs else None
    for result in pruning_rounds(
        run.unit_map,
        run.importance,
        lambda mask: run.score(mask, args.score_sentences or args.subset),
        heads_per_round=args.num_of_heads,
        exact=args.exact_pruning,
        start=report.start,
        costs=macs,
        cost_per_round=args.macs_per_round,
    ):
        scored, final = run.read, {}
        if result.mask.kept in score_at:
            final = {"final_score": run.score(result.mask, None, args.score_beam), "final_sentences": run.read[0]}
        cost = result.cost_told(macs)
        report.add(result, sentences=scored[0], **cost, **final)
        told = result.mask.words, macs_words(cost), run.metric, result.score, *scored
        logger.info("%s left%s: %s %.2f on %d of %d sentences", *told)
        if 0 < result.mask.kept <= 2 * args.num_of_heads:
            logger.info("kept heads by site:\n%s", head_table(result.mask))
    entries = report.entries
    columns = [("score", "sentences")] + [("final_score", "final_sentences")] * bool(score_at)
    header = ("heads kept", "removed %", *(f"{run.metric}{_of(entries, sentences)}" for _, sentences in columns))
    table = text_table(
        header, [(e["heads"], e["removed_percent"], *(e.get(score, "") for score, _ in columns)) for e in entries]
    )
    print(table)
    logger.info("rounds are in %s", report.path)
    return entries


def _of(entries: list[dict], sentences: str) -> str:
    """What the scores of a column are of; rounds of older files do not tell."""
    numbers = {entry[sentences] for entry in entries if sentences in entry}
    return f" of {'/'.join(map(str, sorted(numbers)))} sentences" if numbers else ""


def main() -> None:
    """Command line."""
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        stream=sys.stderr,
        force=True,
    )
    args = options.parse_args_and_arch(get_parser())
    try:
        run(args)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")
