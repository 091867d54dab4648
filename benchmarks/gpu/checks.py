"""The smoke checks, in the order in which they are made.

Arithmetic comes first: it must hold in a process in which nothing was trained.
"""

from __future__ import annotations

from benchmarks.gpu import arithmetic, recording, runs
from benchmarks.gpu.smoke import Check

CHECKS: tuple[Check, ...] = (
    arithmetic.environment,
    arithmetic.fp32_agrees_with_the_cpu,
    arithmetic.gradients_flow,
    arithmetic.every_attack_makes_images,
    arithmetic.to_float_divides_exactly,
    arithmetic.rate_on_device_is_sgd,
    recording.recorded_bf16_batch,
    recording.recorded_bf16_running,
    recording.recorded_fp32_batch,
    recording.a_failed_recording_ends_in_one_line,
    recording.dropout_is_recorded,
    recording.steps_do_not_wait,
    runs.nccl_alone,
    runs.every_method_trains,
    runs.two_processes_share_one_device,
    runs.images_are_read_during_training,
    runs.onnxruntime_on_cuda,
    runs.onnxruntime_on_tensorrt,
    runs.the_suites_own_gpu_tests,
    runs.verify_quick,
)
