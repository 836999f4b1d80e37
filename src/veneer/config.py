"""Configuration: small keyword-only classes, a docstring under each field; YAML in and out.

`TrainConfig` is what `veneer train` runs; its sections are `DataConfig`, `AdapterConfig` and `OptimConfig`. An unknown
key, a wrong type or a value out of range is a `ConfigError` of one line that names the key and the nearest known one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ByteSize, Field, TypeAdapter, ValidationError, field_validator, model_validator

from veneer import combinations
from veneer.errors import ConfigError
from veneer.sections import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
Quant = Literal["none", "nf4", "fp4", "int8", "int8-torchao", "int4-torchao", "hqq"]


class InitOptions(Section):
    """Settings of the initialisations that have some; each is for the `adapter.init` that its name begins with."""

    examples: int = Field(32, ge=1)
    """eva, corda, lora_ga: how many training examples are run through the base to compute the start from."""
    pissa_iterations: int | None = Field(None, ge=0)
    """Absent: exact SVD. A number: fast randomised SVD with so many subspace iterations; 4 to 16 are usual."""
    eva_rho: float = Field(2.0, ge=1)
    """A module may get up to rho times its rank, at the cost of others; 1 leaves every rank as it is."""
    eva_supervised_only: bool = True
    """Look only at the tokens that are trained on."""
    eva_whiten: bool = False
    """Divide each component by the root of its singular value; for vision models."""
    corda_method: Literal["ipm", "kpm"] = "ipm"
    """ipm trains the directions that the examples use most; kpm those they use least, which keeps what the base knows
    about the examples (give it examples of that, not of the task)."""
    lora_ga_direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    """Which of the gradient's first 2r directions A and B take: A the first r and B the second, the other way round,
    in turns, or a random r for both."""
    lora_ga_scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """How large the start is: by output width and gamma, like the weight's largest singular value, divided by the
    scaling, or as it comes."""
    lora_ga_gamma: float = Field(16.0, gt=0)
    """Gamma of the scale "stable": a larger one starts smaller."""


def _checked(config: Any, rules: list[combinations.Rule]) -> Any:
    if reason := combinations.conflict(config, rules):
        raise ConfigError(reason)
    return config


class AdaLoraConfig(Section):
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): start at `adapter.rank`, end at `target_rank` on average."""

    target_rank: int = Field(8, ge=1)
    """Mean rank over the modules at the end; `adapter.rank`, above it, is what each starts with (1.5 times: good)."""
    tinit: float = Field(0.1, ge=0)
    """Steps at the full rank before ranks fall; below 1: a share of all steps."""
    tfinal: float = Field(0.3, ge=0)
    """Last steps, in which the ranks stay as they are; below 1: a share of all steps."""
    deltaT: int = Field(1, ge=1)
    """Steps between two allocations of the ranks."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the averaged sensitivity |w·∂L/∂w|."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of its averaged uncertainty."""
    orthogonality: float = Field(0.5, ge=0)
    """Weight of the regulariser that keeps the factors orthonormal (PEFT's orth_reg_weight)."""


class AdapterConfig(Section):
    """What a LoRA adapter is (Hu et al. 2021, arXiv:2106.09685): ΔW = s·B·A with s = alpha/rank."""

    rank: int = Field(16, ge=1)
    """Rank r of the update: A is (r × d_in), B is (d_out × r)."""
    alpha: float = Field(32.0, gt=0)
    """Numerator of the scaling s = alpha / rank (alpha / √rank with `rslora`)."""
    rslora: bool = False
    """Rank-stabilised scaling alpha/√rank (Kalajdzievski 2023, arXiv:2312.03732); worth it from rank 64 up."""
    target_modules: str | list[str] = "all-linear"
    """"all-linear" (every linear but the output head), "attention", "mlp", a list of names or name endings, or one
    regular expression that must match the whole module name. Linears, Conv1D, convolutions, embeddings and
    MultiheadAttention modules can be adapted. An empty list adapts no module: see `target_parameters`."""
    exclude_modules: str | list[str] | None = None
    """Names, endings or one regular expression of modules to leave alone."""
    layers: list[int] | None = None
    """Adapt only these block indices (all when absent)."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Rank by module: name ending or regular expression → rank."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Alpha by module: name ending or regular expression → alpha."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained too: none, all, or those of the adapted modules."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained in full and saved with the adapter, by name or name ending. The new head of a classifier is added
    to them when an adapter is attached."""
    dora: bool = False
    """DoRA (Liu et al. 2024, arXiv:2402.09353): the norm of each row of W + ΔW is trained apart from its direction."""
    lora_bias: bool = False
    """A trained bias after B: ΔW x + s·b."""
    target_parameters: list[str] = Field(default_factory=list)
    """Parameters adapted besides the modules, by name or name ending, such as the fused experts of a mixture:
    [experts.gate_up_proj, experts.down_proj]."""
    tied_head: Literal["refuse", "both", "embedding"] = "refuse"
    """When an adapted embedding shares its weight with the output head: let both uses see the adapter, or the embedding
    alone (PEFT's default), or refuse, so that it is a choice."""
    trainable_tokens: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embedding rows are trained in full (a list: in the input embedding and a head tied to it; a
    mapping: by module name)."""
    new_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Tokens that the tokenizer is given; the vocabulary grows, and of its rows only theirs are trained."""
    invocation: str | list[int] | None = Field(None, min_length=1)
    """Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397): the adapter acts only from the last occurrence of this
    text (or these token ids) on, so that what comes before may be shared with the base's cache."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora_ga", "loftq"] = "kaiming"
    """How A and B start: kaiming, gaussian, orthogonal, pissa, olora, eva, corda, lora_ga or, on a quantised base, loftq
    (docs/variants.md says when to use which). All but loftq start at the base's own output."""
    init_options: InitOptions = Field(default_factory=InitOptions)
    """Settings of the initialisation."""
    dtype: Literal["float32", "base"] = "float32"
    """Storage of the adapter's weights; arithmetic is in the base's compute dtype either way."""
    lora_fa: bool = False
    """LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A stays as it starts, only B is trained; less memory."""
    adalora: AdaLoraConfig | None = None
    """AdaLoRA: let training spread the rank over the modules; keys target_rank, tinit, tfinal, deltaT, …"""

    @model_validator(mode="after")
    def _goes_together(self) -> AdapterConfig:
        return _checked(self, combinations.ADAPTER)

    @field_validator("exclude_modules")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _adapts_something(self) -> AdapterConfig:
        if not (self.target_modules or self.target_parameters or self.trainable_tokens or self.new_tokens):
            raise ValueError("target_modules is empty, and so are target_parameters, trainable_tokens and new_tokens")
        return self

    @field_validator("rank_pattern")
    @classmethod
    def _positive_ranks(cls, value: dict[str, int]) -> dict[str, int]:
        if any(rank < 1 for rank in value.values()):
            raise ValueError("every rank must be at least 1")
        return value

    @field_validator("init_options", mode="before")
    @classmethod
    def _all_commented_out(cls, value: Any) -> Any:
        return {} if value is None else value  # what YAML reads a bare key as

    @model_validator(mode="after")
    def _options_of_this_init(self) -> AdapterConfig:
        for key, field in InitOptions.model_fields.items():
            used = self.init in ("eva", "corda", "lora_ga") if key == "examples" else key.startswith(f"{self.init}_")
            if not used and getattr(self.init_options, key) != field.default:
                raise ConfigError(f"configuration key 'init_options.{key}': has no effect with init {self.init!r}")
        return self

    @field_validator("alpha_pattern")
    @classmethod
    def _positive_alphas(cls, value: dict[str, float]) -> dict[str, float]:
        if any(alpha <= 0 for alpha in value.values()):
            raise ValueError("every alpha must be above 0")
        return value


class DataConfig(Section):
    """Where examples come from and how they become supervised tokens."""

    train: str | list[str]
    """A file (JSONL, JSON, CSV, Parquet, TXT), a folder of them, a hub data set id, or "bundled"."""
    heldout: str | list[str] | None = None
    """Held-out data for the evaluation loss and scores; absent: `heldout_fraction` of the training data."""
    heldout_fraction: float = Field(0.0, ge=0, lt=0.9)
    """Share of the training examples set aside when `heldout` is absent."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "completion", "text"] = "auto"
    """Data format; "auto" detects it and says which."""
    split: str = "train"
    """Split of a hub data set."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a bad row, or skip and count it."""
    chat_template: str | None = None
    """File with a Jinja chat template to use in place of the tokenizer's."""
    train_on: Literal["assistant", "last-assistant", "all"] = "assistant"
    """Supervise every assistant turn, the last one only, or every token."""
    max_length: int = Field(2048, ge=8)
    """Longest example in tokens."""
    on_long: Literal["truncate", "drop", "split"] = "truncate"
    """What happens to an example above `max_length`; always counted."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many examples."""


class OptimConfig(Section):
    """Optimiser, schedule, batches, evaluation and checkpoints."""

    lr: float = Field(2e-4, gt=0)
    """Peak learning rate; LoRA wants about ten times full fine-tuning's."""
    lora_plus_ratio: float = Field(1.0, gt=0)
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): learning rate of B over that of A."""
    lora_plus_embedding_lr: float | None = Field(None, gt=0)
    """LoRA+'s peak learning rate of adapted embeddings (PEFT's is 1e-6); absent: as for any other factors."""
    lora_fa_correction: bool = True
    """With adapter.lora_fa: correct B's gradient by (A Aᵀ)⁻¹/s², so that ΔW follows full fine-tuning the nearest."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0 switches clipping off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup: float = Field(0.05, ge=0)
    """Warm-up steps; below 1: a share of all steps."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimiser steps, whatever `epochs` says."""
    batch_size: int = Field(16, ge=1)
    """Examples per optimiser step."""
    micro_batch_tokens: int = Field(2048, ge=16)
    """Tokens per forward pass (or the longest example, if longer): a batch is split into rows of this size and their
    gradients are weighted by supervised tokens, so this changes memory and not the result."""
    pack: Literal["auto", "on", "off"] = "auto"
    """Put several sequences in one row without padding and without seeing each other; "auto" checks that the model
    gives the same answer packed and says so if it falls back."""
    share_prefix: bool = True
    """Compute a prompt prefix that several examples of a packed row share once; exact, as no token sees a later one."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    """AdamW in float32, or bitsandbytes' with 8-bit or paged states (NVIDIA GPUs)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile a model's repeated blocks with torch.compile: auto does so on an NVIDIA GPU."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """Replay steps as CUDA graphs, with rows padded to a few sizes: auto does so where nothing is offloaded."""
    checkpointing: Literal["keep", "selective", "recompute", "recompute-offload", "offload", "mixed"] = "keep"
    """What each block keeps for the backward pass. keep: all that saves work. selective: what is dear to compute again
    (when compiled). recompute: its input. recompute-offload: its input, in host memory. offload: what selective keeps, in
    host memory, copied while other blocks compute. mixed: of that as much as is copied in the time that a block computes;
    the rest is computed again. (true and false mean recompute and keep.)"""
    keep_blocks: int = Field(0, ge=0)
    """The last so many blocks keep what selective keeps, whatever checkpointing says: what is left of the memory, spent."""
    embedding: Literal["device", "host"] = "device"
    """Where the input embedding's table is, if it is frozen and not the output head's too: on the device, or in host memory,
    where each step looks up its rows. (Llama-3.1-8B's is 1.05 GB.)"""
    stream: Literal["off", "host", "disk"] = "off"
    """Where the frozen blocks are (docs/stream.md): off: on the device. host: in host memory, a few at a time on the
    device. disk: in the safetensors files, for when host memory is short too. Keeping all for the backward pass
    (checkpointing: keep) is recompute then."""
    resident_blocks: int | Literal["auto"] = "auto"
    """Of a streamed base so many blocks, spread evenly, stay on the device and are copied once: what is left of its memory
    spent on fewer copies, where these are not hidden. auto: as many as fit the plan of the run, if that is faster (without a
    plan: none)."""
    vram: ByteSize | None = None
    """Memory that the run may take on its device, such as 8GB or 7.5GiB (on a CPU: of the process). Settings that are
    left out here (micro_batch_tokens, checkpointing, keep_blocks, optimizer, stream, resident_blocks, embedding, and quant)
    are chosen to fit it, and the run is held to it; docs/memory.md. Absent: the device's free memory."""
    eval_every: int | None = Field(None, ge=1)
    """Held-out loss every so many steps (absent: at each epoch's end)."""
    eval_examples: int | None = Field(None, ge=1)
    """Take the held-out loss on the first so many held-out examples (all when absent)."""
    save_every: int = Field(50, ge=1)
    """Checkpoint every so many steps (and at the end)."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay; the best is kept besides."""
    early_stop: int | None = Field(None, ge=1)
    """Stop after so many held-out evaluations without a better loss."""
    log_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Besides metrics.jsonl: tensorboard, wandb, trackio, where installed."""

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _dial(cls, value: Any) -> Any:
        return {True: "recompute", False: "keep"}[value] if isinstance(value, bool) else value

    @field_validator("resident_blocks", mode="before")
    @classmethod
    def _blocks(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 0):
            raise ValueError("should be auto or a number of blocks")
        return value

    @field_validator("vram", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        return None if value is None else parse_size(value)

    @field_validator("compile", "pack", "stream", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # what YAML reads on/off as


class TrainConfig(Section):
    """Everything a run needs; `veneer init` writes one with comments."""

    model: str = "smollm2-135m-instruct"
    """A name that Veneer knows, a local directory, a GGUF file, or a hub id."""
    data: DataConfig
    """Training and held-out data. A bare string stands for `train`."""
    out: str
    """The run directory."""
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    """What is trained."""
    train: OptimConfig = Field(default_factory=OptimConfig)
    """How it is trained."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Base weights and arithmetic; auto: float32 on a CPU, bfloat16 on a GPU that has it."""
    quant: Quant = "none"
    """Hold the base's linears in fewer bits (docs/quantised.md): nf4 (QLoRA, arXiv:2305.14314), fp4, int8,
    int8-torchao, int4-torchao, hqq. Embeddings, norms and the output head keep their dtype."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initialisation, data order and dropout."""

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("data"), (str, list)):
            values = {**values, "data": {"train": values["data"]}}
        return values

    @model_validator(mode="after")
    def _goes_together(self) -> TrainConfig:
        return _checked(self, combinations.RUN)

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
        """Read a YAML file; `overrides` maps dotted keys ("adapter.rank") to values that win over the file's."""
        return cls.from_dict(read_yaml(path), overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any], overrides: dict[str, Any] | None = None) -> TrainConfig:
        values = dict(values)
        for key, value in (overrides or {}).items():
            put(values, key, value)
        return cls(**values)

    def to_yaml(self) -> str:
        """The whole resolved configuration as YAML that `load` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_size(value: Any) -> int:
    """Bytes of "8GB", "7.5 GiB" or a number of bytes. `ValueError` for what is none, or too little to be meant."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise ValueError("write a number and a unit, such as 8GB or 7.5GiB") from None
    if size < 64_000_000:
        raise ValueError("that is less than any model needs; a unit goes with it, such as 8GB")
    return size


def read_yaml(path: str | Path, expected: str = "keys such as model, data and out") -> dict[str, Any]:
    """Read a mapping from a YAML file. Raises `ConfigError` if it is missing, broken or no mapping of what is `expected`."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: broken YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected {expected}; found {type(values).__name__}")
    return values


def put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key ("adapter.rank"), making the sections on the way. `ConfigError` where one is a plain value."""
    *parents, last = dotted.split(".")
    for parent in parents:
        child = values.get(parent)
        if parent == "data" and isinstance(child, (str, list)):
            child = {"train": child}
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {parent} is not a section")
        values[parent] = dict(child or {})
        values = values[parent]
    values[last] = value
