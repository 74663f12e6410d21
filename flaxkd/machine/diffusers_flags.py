"""The flags of diffusers' training scripts, of its relatives and of the Trainer of transformers, and their names here.

Somebody who comes from there types them as keys of a configuration: the error then says what to type instead.
"""

EVERY = "in optimizer steps, 0 for never"
WHOLE = "it counts the images of an optimizer step, over all devices and accumulation steps"
STEPS = "steps, the optimizer steps: epochs x pictures / batch_size"
RATE = "learning_rate.peak_value or learning_rate.value, as its schedule calls it"
TENSORBOARD = "none needed: WORKDIR has metrics.jsonl, curves.png and TensorBoard's events"
HALF = 'dtype: "bfloat16" or "float32"'
UPLOAD = "none: `python -m convert.to_diffusers --workdir WORKDIR --push-to-hub OWNER/NAME` uploads the result"
MEMORY = "none; remat, accumulate and mesh.fsdp save memory"

# {their name: its name here, or what takes its place}
HERE = {
    # What is trained.
    "pretrained_model_name_or_path": "teacher",
    "pretrained_teacher_model": "teacher",
    "model_name_or_path": "teacher",
    "model_id": "teacher",
    "model": "teacher",
    "pretrained_vae_model_name_or_path": "vae",
    "revision": "none: `hf download OWNER/NAME --revision R --local-dir DIR`, then teacher=DIR",
    "variant": "none: the weights in the folder of the teacher are found",
    "unet_config_path": "student, a row of `python -m flaxkd.students`",
    "unet_config_name": "student, a row of `python -m flaxkd.students`",
    "distill_level": 'student: "sd_small" or "sd_tiny"',
    "prepare_unet": 'init: "teacher" or "random"',
    "use_copy_weight_from_teacher": 'init: "teacher" or "random"',
    "train_text_encoder": 'train: ("unet", "text_encoder")',
    # The loss.
    "lambda_sd": "weight.noise",
    "lambda_kd_output": "weight.output",
    "lambda_kd_feat": "weight.feature",
    "output_weight": "weight.output",
    "feature_weight": "weight.feature",
    "proportion_empty_prompts": "caption_dropout",
    "timestep_bias_strategy": 'timestep_sampling: "uniform", or "min_snr" by the weights of snr_gamma',
    # The optimizer.
    "num_train_epochs": STEPS,
    "num_epochs": STEPS,
    "epochs": STEPS,
    "max_train_steps": "steps",
    "max_steps": "steps",
    "num_steps": "steps",
    "train_steps": "steps",
    "train_batch_size": f"batch_size; {WHOLE}",
    "per_device_train_batch_size": f"batch_size; {WHOLE}",
    "per_gpu_batch_size": f"batch_size; {WHOLE}",
    "gradient_accumulation_steps": f"accumulate; batch_size stays that of the optimizer step: {WHOLE}",
    "gradient_checkpointing": "remat",
    "lr": RATE,
    "scale_lr": f"none: multiply {RATE}",
    "lr_scheduler": "learning_rate.schedule, a schedule of optax with its arguments",
    "lr_scheduler_type": "learning_rate.schedule, a schedule of optax with its arguments",
    "lr_warmup_steps": "learning_rate.warmup_steps, in a schedule that has it",
    "warmup_steps": "learning_rate.warmup_steps, in a schedule that has it",
    "optim": "optimizer.name, an optimizer of optax with its arguments",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "adam_weight_decay": "optimizer.weight_decay",
    "weight_decay": "optimizer.weight_decay",
    "use_8bit_adam": MEMORY,
    "max_norm": "max_grad_norm",
    "use_ema": "ema_decay, e.g. 0.9999",
    "offload_ema": MEMORY,
    # The machine.
    "mixed_precision": HALF,
    "precision": HALF,
    "fp16": HALF,
    "bf16": HALF,
    "allow_tf32": HALF,
    "enable_xformers_memory_efficient_attention": "attention; the form that pays on the device is chosen without it",
    "num_gpus": "none: all devices are used; mesh says how",
    "devices": "none: all devices are used; mesh says how",
    "local_rank": "the flag --distributed",
    "dataloader_num_workers": "none: pictures are encoded once, and batches are read ahead",
    # The data.
    "train_data_dir": "data.source",
    "data_dir": "data.source",
    "dataset_name": "data.source; a set of the hub first goes through `python -m flaxkd.cache`",
    "dataset": "data.source",
    "image_column": "the flag --image-column of `python -m flaxkd.cache`",
    "caption_column": "the flag --caption-column of `python -m flaxkd.cache`",
    "max_train_samples": "none: steps x batch_size pictures are seen",
    "resolution": "data.resolution",
    "image_size": "data.resolution",
    "center_crop": "none: pictures are always cropped so",
    "crops_coords_top_left_h": "none: every picture's own crop conditions SDXL",
    "crops_coords_top_left_w": "none: every picture's own crop conditions SDXL",
    "random_flip": "data.random_flip",
    "cache_dir": "the environment variable FLAXKD_CACHE",
    # What is shown and saved.
    "output_dir": "the flag --workdir",
    "logging_dir": "the flag --workdir; TensorBoard's events are in WORKDIR/tensorboard",
    "logging_steps": f"log_every, {EVERY}",
    "report_to": TENSORBOARD,
    "tracker_project_name": TENSORBOARD,
    "validation_prompt": "sample.prompts",
    "validation_prompts": "sample.prompts",
    "prompts": "sample.prompts",
    "num_validation_images": "sample.prompts: one picture for each",
    "validation_steps": f"sample.every for pictures, validation.every for the loss, {EVERY}",
    "validation_epochs": f"sample.every for pictures, validation.every for the loss, {EVERY}",
    "eval_steps": f"validation.every, {EVERY}",
    "guidance_scale": "sample.guidance",
    "num_inference_steps": "sample.steps",
    "scheduler": "sample.sampler",
    "checkpointing_steps": f"checkpoint.every, {EVERY}",
    "save_steps": f"checkpoint.every, {EVERY}",
    "checkpoints_total_limit": "checkpoint.keep",
    "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "none: the same command resumes",
    "push_to_hub": UPLOAD,
    "hub_model_id": UPLOAD,
    "hub_token": UPLOAD,
}
