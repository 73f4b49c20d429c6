"""The paper's problems on two CPU cores: four numbers of 1..99, targets 10..100, context 2,048 of the built-in tokens.

    python launch/train.py --config=configs/countdown4.py:facts            # first arithmetic: two million tokens
    python launch/train.py --config=configs/countdown4.py --start=runs/countdown4_facts  # then SFT, and evaluation
    python launch/train.py --config=configs/countdown4.py:adaptive.rl --checkpoint=runs/countdown4  # then GRPO
    python launch/reproduce.py --list                                      # all of it, and the paper's claims
    python launch/reproduce.py --words=gpu                                 # the same, for an accelerator

A variant is a name, and words after it, with dots between:

    adaptive, serial, direct    a way of reasoning
    adaptive_budget             prompts name the number of children
    serial_budget               prompts name the number of tokens
    tree_of_thoughts, pasta, hogwild
                                the other methods, by SFT alone
    facts                       bare arithmetic, where the others start from
    .beams                      the reference's beams: see below
    .nested                     (after adaptive) children hand their operations to children of their own
    .rl                         GRPO of it, to be started from its SFT with --checkpoint
    .path                       (after .rl) with a price on the longest chain of tokens
    .gpu                        for an accelerator: 6.5M parameters, bfloat16, batches four times as large
    .quick                      minutes: does everything run? Learns nothing

The facts come first: if they are only mixed in, they are learnt after the search. They stay in every batch afterwards,
so that they are not forgotten.

Departures from the reference:
the searches try every operation in the order in which it is generated (`task.heuristic="none"`, beams of 24), so
that what comes next follows from the text: a small model can't rank thirty operations by the distance of their numbers
to the target's factors, which is what the reference's beams ask of it;
SoS+ and children search below each operation before they write the next (`task.search_order`), and write a state again
when they come back to it (`task.restate`), so that what a line copies stands close before it;
an operation with too large a result is written up to its `=`, and before or in place of a quotient the product that
tells if there is one (`task.attempts`), so that every pair has its four lines, and none is left out by a guess;
a parent repeats what the last child that won handed back, where the reference's writes the first one's path from its
own root on (`task.parent_replay`): the state that it begins with lists the operation before it;
the first child that wins ends its siblings, in rollouts (`rollout.cancel_on_success`) and in what demonstrations join
(`task.cancel_on_success`);
a parent hands each of its operations to a child, where the reference's explores some of them itself;
operations with a result above 255 are left out (`task.max_result`), so that every number is one token;
a quarter of all training tokens is bare arithmetic and comparisons with targets (`data.facts_share`), most of it
products and divisions;
number embeddings start as waves (`sft.number_waves`, in `:facts`);
of the children that find nothing, which are most, a tenth is learnt from (`data.children_share`);
only generated tokens have loss, and the replay of the winning path counts three times;
the learning rate falls over nearly all of the run: where it is constant the loss stands still.

With `.beams` beams and spawns are the reference's (docs/recipe.md has what came of it).
"""

from collections.abc import Collection

from ml_collections import ConfigDict

from configs import grpo

_OTHERS = ("tree_of_thoughts", "pasta", "hogwild")
_NAMES = ("adaptive", "adaptive_budget", "serial", "serial_budget", "direct", *_OTHERS, "facts")


def get_config(variant: str = "adaptive") -> ConfigDict:
    name, *words = variant.split(".")
    changes = {"beams": beams, "nested": nested, "rl": rl, "path": path, "gpu": gpu, "quick": quick}
    if name not in _NAMES or not set(words) <= set(changes) or not _fit(name, words):
        raise ValueError(
            f"configs/countdown4.py:{variant}: no such variant; choose one of {', '.join(_NAMES)}, and after it "
            "with dots any of beams, nested (adaptive alone), rl, path (after rl), gpu, quick; tree_of_thoughts, pasta "
            "and hogwild have no rl"
        )
    config = facts() if name == "facts" else sft(name)
    for word in words:
        changes[word](config)
    return config


def _fit(name: str, words: Collection[str]) -> bool:
    rl_fits = name not in _OTHERS if "rl" in words else "path" not in words
    return rl_fits and ("nested" not in words or name.startswith("adaptive"))


def sft(name: str = "adaptive") -> ConfigDict:
    """Configure SFT of a 2.1M-parameter Llama on searches that leave nothing out."""
    config = grpo.get_config("laptop")
    method, budget = name.removesuffix("_budget"), name.endswith("_budget")
    config.name = "countdown4" if name == "adaptive" else f"countdown4_{name}"
    config.data.update(method=method, condition_on_budget=budget)
    config.model.update(num_layers=4, embed_dim=192, mlp_dim=512, num_heads=4, num_kv_heads=4, max_seq_len=2_048)
    config.model.tie_embeddings = False
    config.task.update(
        num_numbers=4,
        max_number=99,
        max_target=100,
        parent_beams=tuple(range(1, 25)) if budget else (24,),  # four numbers have at most 24 operations
        child_beam_max=24,
        spawn_probability=1.0,
        retry_probability=0.0,
        serial_beam_min=24,
        serial_beam_max=24,
        serial_dfs_probability=1.0,
        heuristic="none",
        search_order="depth_first",
        restate=True,
        attempts=True,
        parent_replay="child",
        cancel_on_success=True,
        max_result=255,
    )
    config.task.num_unseen_targets = 9
    config.data.update(num_train=60_000, num_validation=1_000, num_test=10_000, num_test_unseen_targets=1_000)
    config.data.update(replay_weight=3.0, facts_share=0.25, children_share=0.1)
    config.sft.update(num_steps=8_000, rows_per_step=4, row_len=2_048)
    config.sft.update(checkpoint_every=50, validate_every=500, validation_rows=16)
    config.sft.optimizer.update(schedule="trapezoid", warmup_steps=100, decay_steps=7_500)
    config.sft.optimizer.update(learning_rate=5e-4, muon_learning_rate=0.01)
    config.engine.update(lanes=16, pages=2_560, prefill_lanes=8)
    config.rollout.update(max_steps=2_048, max_spawns=4, max_children=24, max_total_tokens=65_536)
    config.rollout.cancel_on_success = True
    config.grpo.update(num_steps=0, row_len=2_048)
    config.faults.keep_checkpoints = 3
    config.evaluation.update(num_problems=256, also_temperature=1.0)
    if name in _OTHERS:
        _other(config)
    return config


def _other(config: ConfigDict) -> None:
    """Give the other methods what suits them in the same context.

    Tree of Thoughts goes on from every first operation. PASTA's parent reads all that its children wrote, so it opens
    one child at a time beside its own search: of two to five operations a round, two solve most within the context. The
    two workers of Hogwild! share it, and bare facts have no workers.
    """
    if config.data.method == "hogwild":
        config.data.facts_share = 0.0
    if config.data.method == "tree_of_thoughts":
        config.tree_of_thoughts.breadth = 24
        config.rollout.max_total_children = 512
        config.data.children_share = 1.0
    if config.data.method == "pasta":
        config.task.update(parent_beams=(2,), retry_probability=1.0)
        config.rollout.update(max_spawns=16, cancel_on_success=False)


def facts() -> ConfigDict:
    """Configure the same model on bare arithmetic, with a twentieth of demonstrations: the start of the others."""
    config = sft()
    config.name = "countdown4_facts"
    config.model.max_seq_len = 1_024
    config.data.update(num_train=500, num_validation=32, num_test=16, num_test_unseen_targets=16, facts_share=0.95)
    config.sft.update(num_steps=1_000, rows_per_step=2, row_len=1_024, number_waves=0.5, checkpoint_every=100)
    config.sft.update(validate_every=600, validation_rows=4)
    config.sft.optimizer.update(schedule="constant", warmup_steps=50, learning_rate=1e-3, muon_learning_rate=0.02)
    config.engine.update(lanes=2, pages=256, prefill_lanes=2)
    config.rollout.max_steps = 16
    config.grpo.update(row_len=1_024, validation_problems=16)
    config.evaluation.num_problems = 1
    return config


def beams(config: ConfigDict) -> None:
    """Take the reference's beams, spawns and order of operations."""
    config.name += "_beams"
    config.task.update(parent_beams=tuple(range(1, 11)), child_beam_max=15, spawn_probability=0.9, heuristic="mult")
    config.task.update(search_order="breadth_first", restate=False, attempts=False, parent_replay="root")
    config.task.cancel_on_success = False
    config.rollout.cancel_on_success = False
    config.task.update(serial_beam_min=1, serial_beam_max=5, serial_dfs_probability=0.5)
    config.data.children_share = 1.0
    config.rollout.max_children = 16


def nested(config: ConfigDict) -> None:
    """Let children spawn, too, so that no thread goes from one state to the next."""
    config.name += "_nested"
    config.task.spawn_depth = 2
    config.rollout.update(max_depth=2, max_total_children=512)


def rl(config: ConfigDict) -> None:
    """Add GRPO: for every way of reasoning the same number of rollouts, which is what their steps cost.

    At temperature 1, since the rollouts of a group hardly differ at 0.5, and in the calls that led to the answer alone.
    """
    config.name += "_rl"
    config.grpo.update(num_steps=16, prompts_per_step=16, group_size=8, inner_updates=2, checkpoint_every=1)
    config.grpo.update(objective="dapo", credit="used")
    config.grpo.optimizer.update(learning_rate=1e-4, schedule="cosine")
    config.rollout.temperature = 1.0


def path(config: ConfigDict) -> None:
    """Add a price on the longest chain of tokens: 500 of them cost a twentieth of an answer."""
    config.name += "_path"
    config.grpo.reward.sequential_token_price = 1e-4


def gpu(config: ConfigDict) -> None:
    """Take a wider and deeper model, which an accelerator trains in minutes, and lanes by the hundred."""
    config.name += "_gpu"
    config.model.update(num_layers=6, embed_dim=256, mlp_dim=1_024)
    config.model.compute_dtype = "bfloat16"
    config.data.num_workers = 16
    if config.data.method == "serial":
        config.data.num_train = 200_000  # most tokens of its searches are in those that no row holds
    config.grpo.rows_per_microbatch = 32
    if config.grpo.num_steps:
        config.grpo.update(num_steps=100, prompts_per_step=24, validate_every=10, validation_problems=200)
    config.engine.update(lanes=512, pages=32_768, prefill_lanes=32, steps_per_visit=32)
    if not config.name.startswith("countdown4_facts"):
        config.sft.update(rows_per_step=16, checkpoint_every=1_000, validate_every=1_000)
        config.sft.optimizer.update(learning_rate=6e-4, muon_learning_rate=0.012)
        config.evaluation.num_problems = 2_000


def quick(config: ConfigDict) -> None:
    """Make everything small."""
    config.name += "_quick"
    rl_too = config.grpo.num_steps > 0
    config.model.update(num_layers=1, embed_dim=64, mlp_dim=128, num_heads=1, num_kv_heads=1)
    config.data.update(num_train=128, num_validation=32, num_test=32, num_test_unseen_targets=16)
    config.sft.update(num_steps=4, rows_per_step=2, checkpoint_every=2, validate_every=2, validation_rows=2)
    config.sft.optimizer.update(warmup_steps=1, decay_steps=1)
    config.rollout.update(max_steps=64)
    config.grpo.update(num_steps=2 * rl_too, prompts_per_step=2, group_size=2, validate_every=2, validation_problems=4)
    config.evaluation.num_problems = 8
