"""Every recipe key, once: its type, default and meaning; recipes/SCHEMA.json and REFERENCE.md are generated from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from bigtrain.config.data_section import DataSection as DataSection
from bigtrain.config.section import Section as Section
from bigtrain.config.types import (
    Auto,
    Betas,
    Bytes,
    Count,
    CountOrZero,
    Fraction,
    Kept,
    NodeRange,
    NonNegative,
    OpenFraction,
    Positive,
    RunName,
    Seconds,
    Stage,
    Text,
    WarmUp,
    Word,
)

Family = Literal["bert", "gpt", "llama"]
RecomputePolicy = Literal["none", "selective", "full", "offload"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "aim", "swanlab", "comet"]


class ModelSection(Section):
    """What is trained. Keys are spelled as in Hugging Face's BERT and Llama, for all families."""

    family: Family
    """`bert` (post-LN, masked language model), `gpt` (GPT-2) or `llama` (RMSNorm, RoPE, SwiGLU, grouped-query)."""
    preset: Text | None = None
    """A published shape, such as `bert-large`; the keys below override it."""
    vocab_size: Count | Auto = "auto"
    """Tokens that the model knows; `auto` is the tokenizer's. A larger number is allowed."""
    hidden_size: Count | None = None
    """Width of the residual stream; required without a preset."""
    num_hidden_layers: Count | None = None
    """Number of blocks; required without a preset."""
    num_attention_heads: Count | None = None
    """Attention heads; must divide `hidden_size`; required without a preset."""
    num_key_value_heads: Count | None = None
    """Key and value heads (llama); must divide `num_attention_heads`; null is as many as there are heads."""
    intermediate_size: Count | None = None
    """Width inside the MLP; null is four times `hidden_size`."""
    max_position_embeddings: Count | Auto = "auto"
    """Longest sequence; `auto` is the larger of the preset's and `data.sequence_length`."""
    initializer_range: Positive = 0.02
    """Standard deviation of the initial weights."""
    norm_eps: Positive | None = None
    """Epsilon of the normalizations; null is the family's: 1e-12 (bert), 1e-5 (gpt), 1e-6 (llama)."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position frequencies (llama)."""
    tie_word_embeddings: bool | None = None
    """Whether the head shares the token embedding; null is the family's: true (bert, gpt), false (llama)."""


class TrainSection(Section):
    """The objective, the batch and the length of the run."""

    objective: Literal["mlm", "clm", "mlm_nsp"]
    """`mlm` (masked tokens), `clm` (the next token) or `mlm_nsp` (masked tokens and next-sentence pairs: two texts, of
    which the second follows the first or, in half of them, comes from another document)."""
    masking_probability: OpenFraction = 0.15
    """Share of a row's tokens that are to be predicted (not clm); of these 80% are masked, 10% replaced, 10% kept."""
    whole_word_masking: bool = False
    """Choose whole words to be predicted, all tokens of each, instead of single tokens (not clm)."""
    init_from: Text | None = None
    """A run, a checkpoint or an imported folder: a new run starts from its weights, with the shape of its model."""
    global_batch_size: Count = 256
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Count | Auto = "auto"
    """Sequences per rank and forward."""
    steps: Count | None = None
    """Length of the run in optimizer steps; one of `steps`, `tokens`, `epochs` is required."""
    tokens: Count | None = None
    """Length of the run in tokens, such as 32B."""
    epochs: Positive | None = None
    """Length of the run in passes over the training data."""
    eval_every: Count | None = None
    """Evaluate each so many steps, and at the end; null: never."""
    eval_rows: Count | None = 1024
    """Rows of the validation split that an evaluation reads; null: all."""
    dropout: Fraction = 0.0
    """Dropout of embeddings and of what each block adds to the residual stream."""
    attention_dropout: Fraction = 0.0
    """Dropout of attention probabilities (slow on CUDA: no fused kernel has it for variable lengths)."""
    max_grad_norm: Positive | None = 1.0
    """Clip gradients to this global norm; null: no clipping."""
    max_skipped: CountOrZero = 10
    """Stop after more than this many steps in a row whose loss or gradient was not finite, or skipped as a spike."""
    on_spike: Literal["stop", "skip", "rollback", "ignore"] = "ignore"
    """What a loss far above the last 100 does: end the run, leave that update out, or go back and leave rows out."""
    z_loss: NonNegative = 0.0
    """Weight of the squared log-partition in the loss, which keeps logits small."""
    label_smoothing: Fraction = 0.0
    """Share of the target's probability that is spread over the vocabulary."""
    compile: bool | Auto = "auto"
    """Compile each block with torch.compile; `auto` does so on CUDA."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` is CUDA if there is any."""


class OptimizerSection(Section):
    """How gradients become weights. Biases and normalization weights get no weight decay."""

    name: Literal["adamw", "lamb", "muon", "adafactor"] = "adamw"
    """The optimizer."""
    learning_rate: NonNegative
    """The peak learning rate."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    betas: Betas = [0.9, 0.999]
    """Decay of the first and second moment."""
    eps: Positive = 1e-6
    """Added to the root of the second moment."""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """After warm-up: `linear` to zero, `cosine` to a tenth, `wsd` flat with a linear last fifth, `constant` flat."""
    warmup_steps: WarmUp = 0
    """Steps of linear warm-up, or a share of the run such as 6%."""
    state: Literal["fp32", "bf16", "8bit", "4bit", "auto"] = "fp32"
    """Precision of the optimizer states."""
    gradient_release: bool | Auto = False
    """Update each weight inside the backward pass, so that gradients never all exist."""


class AmpSection(Section):
    """Mixed precision."""

    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Precision of matrix products and activations."""
    master_weights: Literal["fp32", "split24", "none", "auto"] = "fp32"
    """Precision in which weights are kept."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over ranks."""


class RecomputeSection(Section):
    """Activation recomputation."""

    policy: RecomputePolicy | Auto | Annotated[list[RecomputePolicy], Field(min_length=1)] = "auto"
    """What each block recomputes in the backward pass instead of keeping it; a list has one entry a block."""


class ShardingSection(Section):
    """How ranks share the model."""

    engine: Literal["auto", "fsdp2", "deepspeed"] = "auto"
    """The library that shards."""
    zero_stage: Stage = "auto"
    """What is sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    replicate: Count | Auto = "auto"
    """Groups of ranks that each hold the whole model (hybrid sharding); of `least:most` nodes, at the fewest."""
    check_replicas_every: Count | None = 100
    """Compare by a hash what several ranks hold alike each so many steps, as before a checkpoint; null: only then."""
    offload: Literal["none", "optimizer", "all", "nvme", "auto"] = "auto"
    """What lives in host memory or on NVMe."""
    nvme_path: Text | None = None
    """The folder on the NVMe drive for `offload: nvme`, on every node the same."""
    tensor_parallel: Count = 1
    """Ranks that share each matrix product."""


class MemorySection(Section):
    """What the plan may use."""

    budget: Bytes | Auto = "auto"
    """Bytes per device; `auto` is what the device has."""


class CheckpointSection(Section):
    """When the state of the run is saved. It is always saved at the end."""

    every_steps: Count | None = 500
    """Save each so many steps; null: not by steps."""
    every_minutes: Positive | None = None
    """Save each so many minutes; null: not by time."""
    keep: Kept = 3
    """Newest checkpoints that are kept."""
    asynchronous: bool = True
    """On CUDA copy the state to the host and write while training goes on; a CPU's state is written without a copy."""


class LoggingSection(Section):
    """What is written down while training."""

    every_steps: Count = 10
    """Log each so many steps."""
    sample_every: Count | None = None
    """Generate a sample each so many steps; null: never."""
    trackers: list[Tracker] = ["tensorboard"]
    """Where metrics go besides metrics.jsonl."""


class ClusterSection(Section):
    """Where the run happens; the only lines that change from one machine to many."""

    nodes: Count | NodeRange = 1
    """Number of machines, or `least:most`."""
    devices_per_node: Count | Auto = "auto"
    """Processes per machine; `auto` is one a GPU, or one on a CPU."""
    rendezvous: Text | None = None
    """host:port where several machines meet."""
    timeout: Seconds = 60.0
    """How long a rank waits for the others."""
    scheduler: Literal["local", "slurm", "kubernetes"] = "local"
    """Who places the processes; `launch --render` prints the job file for another than `local`."""
    time_limit: Seconds | None = None
    """How long a job may run; null: as long as the scheduler lets it."""
    partition: Word | None = None
    """Slurm: the partition; null is the cluster's default."""
    image: Word | None = None
    """Kubernetes: the container image, with bigtrain in it."""
    volume: Word | None = None
    """Kubernetes: the PersistentVolumeClaim that holds the run folder and tokenized data, shared by all nodes."""


class Recipe(Section):
    """What the user wrote; `auto` may stand where the plan chooses."""

    name: RunName
    """Names the run folder; without it, the file's name."""
    seed: CountOrZero = 1234
    """Seeds weights, data order, masks and dropout."""
    model: ModelSection
    data: DataSection = DataSection()
    train: TrainSection
    optimizer: OptimizerSection
    amp: AmpSection = AmpSection()
    recompute: RecomputeSection = RecomputeSection()
    sharding: ShardingSection = ShardingSection()
    memory: MemorySection = MemorySection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    cluster: ClusterSection = ClusterSection()

    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Compare what recipes say, not where it was written."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    def origin(self, key: str) -> str:
        """Return where a dotted key was written: `file:line`, `command line`, or the nearest parent's place."""
        while key and key not in self._origins:
            key = key.rpartition(".")[0]
        return self._origins.get(key, "")

    def writes(self, key: str) -> bool:
        """Return whether this very key was written, in the file or on the command line."""
        return key in self._origins

    def with_origins(self, origins: Mapping[str, str]) -> Recipe:
        """Return the same recipe, its keys written in these places; the key "" stands for the whole file."""
        recipe = self.model_copy()
        recipe._origins = dict(origins)
        return recipe
