"""Keys about the run itself: batches, learning rate, precision, evaluation, checkpoints, logs.

Names and defaults are those of transformers' TrainingArguments. Those it has and that are not here
are in `trueup.config.names`, with what to use instead or why they change nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trueup.config.values import (
    AutoFlag,
    Float,
    Int,
    Lower,
    Mapping,
    Names,
    NonNegative,
    NonNegativeFloat,
    OffIsNo,
    OnIsFull,
    Positive,
    PositiveFloat,
    Resume,
    Section,
    Split,
    Steps,
)

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
Tracker = Literal["all", "tensorboard", "wandb", "trackio", "mlflow", "swanlab"]
Interval = Annotated[Literal["no", "steps", "epoch"], OffIsNo]
Checkpointing = Annotated[Literal["auto", "off", "full", "selective"], OnIsFull]
Beta = Annotated[Float, Field(ge=0, lt=1)]


class TrainSection(Section):
    # the run
    output_dir: str | None = None
    """Directory of the run; saves/<model>/<finetuning_type>/<stage> when unset."""
    run_name: str | None = None
    """Name of the run in trackers and lists."""
    do_train: bool = False
    """Train. Implied when no do_… key is given."""
    do_eval: bool = False
    """Evaluate (at the end when training too)."""
    do_predict: bool = False
    """Answer the rows of eval_dataset, with BLEU and ROUGE against their own answers."""
    predict_with_generate: bool = False
    """Evaluate SFT by generated answers too, with BLEU and ROUGE; do_predict always generates."""
    resume_from_checkpoint: Resume = None
    """Go on from a checkpoint: a path, or auto for the newest valid one (start afresh when there
    is none)."""
    new_run: bool = False
    """When output_dir holds a run, train in a numbered directory beside it."""
    overwrite_output_dir: bool = False
    """When output_dir holds a run, move it aside and start afresh."""
    allow_changed: Names = []
    """Keys that may differ from the checkpoint a run goes on from, or all."""
    strict: bool = False
    """Stop at anything worth a warning."""
    on_unused_keys: Annotated[Literal["error", "warn"], Lower] = "error"
    """Unknown keys and keys without effect: stop, or only say so."""
    seed: NonNegative = 42
    """Everything random follows from it."""
    data_seed: NonNegative | None = None
    """Seed of the order of the data; seed when unset."""
    full_determinism: bool = False
    """Deterministic kernels everywhere, slower on a GPU."""

    # how much, how fast
    num_train_epochs: PositiveFloat = 3.0
    """Passes over the data."""
    max_steps: Annotated[Int, Field(ge=-1)] = -1
    """Optimizer steps; wins over num_train_epochs. -1 leaves it to the epochs."""
    per_device_train_batch_size: Positive = 8
    """Examples (or pairs) in a micro-batch. auto: as batch_tokens: auto has it, at as many examples per step."""
    per_device_eval_batch_size: Positive = 8
    """Examples in a micro-batch of evaluation."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches per optimizer step."""
    dataloader_drop_last: bool = False
    """Leave out an epoch's last, smaller step."""
    train_sampling_strategy: Annotated[Literal["random", "sequential", "group_by_length", "batch_rebalance"], Lower] = (
        "random"
    )
    """Order of the examples; group_by_length puts similar lengths together."""
    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate."""
    lr_scheduler_type: Annotated[Scheduler, Lower] = "linear"
    """How the learning rate moves after warm-up."""
    lr_scheduler_kwargs: Mapping = {}
    """Further settings of the schedule, such as min_lr_rate."""
    warmup_steps: NonNegativeFloat = 0
    """Steps in which the learning rate rises; below 1 a share of all steps."""
    warmup_ratio: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    """Share of all steps in which the learning rate rises."""
    optim: Annotated[str, Lower] = "adamw_torch"
    """Optimizer, by transformers' names: adamw_torch, adamw_8bit, adafactor, lion_8bit, muon, galore_adamw … ."""
    optim_args: str | None = None
    """Further settings of the optimizer, as name=value,name=value."""
    optim_target_modules: Names = []
    """Matrices a projecting optimizer works on: all of the layers', or parts of their names."""
    lr_multipliers: Mapping = {}
    """Learning rates over learning_rate, by parts (regular expressions) of parameters' names: {embed_tokens: 0.1}."""
    layer_lr_decay: PositiveFloat | None = None
    """Learning rate of a layer over that of the next one up; embeddings lie below the first."""
    weight_decay: NonNegativeFloat = 0.0
    """Pull of weights towards zero; biases and norms are left out."""
    adam_beta1: Beta = 0.9
    """Adam's memory of gradients."""
    adam_beta2: Beta = 0.999
    """Adam's memory of squared gradients."""
    adam_epsilon: PositiveFloat = 1e-8
    """Adam's guard against division by zero."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients longer than this are shortened to it; 0 leaves them."""
    label_smoothing_factor: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    """Label smoothing of the SFT loss."""
    neftune_noise_alpha: NonNegativeFloat | None = None
    """Noise on the embeddings while training (NEFTune), divided by the root of a row's length times their width; 5 to
    15 in its paper."""

    # precision, memory, speed
    bf16: AutoFlag = None
    """Compute in bf16. Unset: wherever the hardware has it; fp32 elsewhere."""
    fp16: AutoFlag = None
    """Compute in fp16 with loss scaling (GPU)."""
    tf32: AutoFlag = None
    """Let a GPU shorten fp32 products to tf32."""
    fp8: bool = False
    """Compute in fp8."""
    gradient_checkpointing: Checkpointing = "auto"
    """Recompute activations instead of keeping them: less memory, more time. auto: in as few layers
    as memory asks for; off; full: in all; selective: in half of them, more where memory asks for it."""
    gradient_checkpointing_kwargs: Mapping = {}
    """Further settings of gradient checkpointing."""
    activation_offloading: bool = False
    """Keep activations in the host's memory until the backward: less of a GPU's memory, more time."""
    offload_optimizer: bool = False
    """Keep fp32 masters, gradients and the optimizer's state in the host's memory, and step there (one GPU)."""
    torch_compile: bool = False
    """Compile the model."""
    torch_compile_backend: str | None = None
    """Backend of torch.compile."""
    torch_compile_mode: str | None = None
    """Mode of torch.compile."""
    torch_empty_cache_steps: Positive | None = None
    """Give cached GPU memory back every so many steps."""
    profile: bool = False
    """Write where the time went into the run's directory."""

    # logs
    logging_strategy: Interval = "steps"
    """When to log: steps, epoch or no."""
    logging_steps: Steps = 500
    """Log every so many steps; below 1 a share of all steps."""
    logging_first_step: bool = False
    """Log the first step too."""
    log_entropy: bool = False
    """Log how unsure the model is at the answers' tokens (`entropy`, nats): of logged steps and evaluations only."""
    report_to: Annotated[list[Tracker], Split] = []
    """Trackers: tensorboard, wandb, trackio, mlflow, swanlab, or none."""
    project: str = "trueup"
    """Project name in trackers."""
    plot_loss: bool = True
    """Draw the curves as PNG files."""
    print_param_status: bool = False
    """List the weights before the first step: shape, type, device, and whether they train."""
    disable_tqdm: bool | None = None
    """Plain lines instead of a progress display."""
    log_level: str = "passive"
    """How much is said: debug, info, warning, error; passive is info."""
    compute_accuracy: bool = False
    """Evaluate SFT by the share of tokens that the model would have written itself, too (`accuracy`)."""

    # evaluation
    eval_strategy: Interval = "no"
    """When to evaluate while training: steps, epoch or no."""
    eval_steps: Steps | None = None
    """Evaluate every so many steps; logging_steps when unset."""
    eval_delay: NonNegativeFloat = 0
    """Steps or epochs before the first evaluation."""
    eval_on_start: bool = False
    """Evaluate once before the first step."""
    load_best_model_at_end: bool = False
    """End with the best evaluated weights instead of the last."""
    metric_for_best_model: str | None = None
    """What best means; the evaluation loss when unset."""
    greater_is_better: bool | None = None
    """Whether more of that metric is better; no for losses when unset."""
    early_stopping_steps: Positive | None = None
    """Stop after this many evaluations without a better one."""
    regression_report: bool = True
    """After preference training, compare the model with its start: plain text, length, diversity, refusals, KL."""

    # checkpoints
    save_strategy: Annotated[Literal["no", "steps", "epoch", "best"], OffIsNo] = "steps"
    """When to save a checkpoint: steps, epoch, best or no."""
    save_steps: Steps = 500
    """Save every so many steps; below 1 a share of all steps."""
    save_total_limit: Positive | None = None
    """Keep this many checkpoints; the best and the last two valid ones always stay."""
    save_only_model: bool = False
    """Checkpoints without optimizer state; they cannot be resumed."""
    push_to_hub: bool = False
    """Upload the result."""
    hub_model_id: str | None = None
    """Repository to upload to."""
    hub_private_repo: bool | None = None
    """Whether that repository is private."""
    hub_revision: str | None = None
    """Branch to upload to."""
    hub_strategy: Annotated[Literal["end", "every_save", "checkpoint", "all_checkpoints"], Lower] = "every_save"
    """When to upload."""
    hub_always_push: bool = False
    """Upload even while the last upload runs."""

    # the machine
    dataloader_num_workers: NonNegative = 0
    """Processes that prepare batches."""
    dataloader_pin_memory: bool = True
    """Prepare batches in page-locked memory."""
    dataloader_persistent_workers: bool = False
    """Keep those processes between epochs."""
    dataloader_prefetch_factor: Positive | None = None
    """Batches each of them prepares ahead."""
    ddp_timeout: Positive = 1800
    """Seconds a process waits for the others."""
    ddp_backend: Annotated[Literal["nccl", "gloo", "mpi", "xccl", "hccl", "ccl", "cncl", "mccl"], Lower] | None = None
    """How processes talk; the device's own when unset."""
    deepspeed: Mapping | str | None = None
    """DeepSpeed settings, a JSON file."""
    fsdp: str | bool | Names | None = None
    """Shard the model over the devices."""
    fsdp_config: Mapping | str | None = None
    """Settings of that."""
    ray_num_workers: Positive = 1
    """Workers when training on Ray."""
    ray_init_kwargs: Mapping | None = None
    """Settings of ray.init."""
