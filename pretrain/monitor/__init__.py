"""How goes a run? Its log, the console, and what else is told of every logged step.

`OUT/log.jsonl` has one JSON object a logged step (`log_every`, the first, the last). Times are means over the steps
since the line before, the rest is of the step; a field that a run has nothing for is left out:

    step, time                    steps done; seconds since 1970
    nats                          by target: mean over the global batch of the step
    nats_by_source                by target and source of the recipe: mean over the images of the source in the batch
                                  that count; where the loss is a mean over images and the recipe has several sources
    collapse, collapsed           what was measured of features (pretrain/collapse.py); targets that collapsed
    grad_norm                     of the whole gradient, before clipping
    grad_norm_by_part             of encoder, decoders, text and heads: their squares add up to the whole's
    grad_norm_image, _label       of the gradient that image and label losses send to the encoder's output
    grad_norm_by_target           the same of every target that reads the output by itself; A+B share what they read;
                                  those of labels before lambda
    lambda, lr, momentum          weight of the label losses, learning rate, momentum of the teacher
    step_seconds, seconds         of a step; the same by part (pretrain/clock.py), mean over ranks: they add up to it
    images_per_second, pairs_per_second
    teraflops_per_gpu, mfu        model FLOP/s (pretrain/monitor/speed.py); its share of the device's peak
    slowest                       rank, host and own seconds, where one takes clearly longer than the others
    memory_bytes                  allocated and reserved on the GPU, and of the process on the host: most of any rank
    eta_seconds                   that remain at the pace of the last steps
    gpu_hours, gpu_hours_left     ranks x hours of all starts so far, also of what was undone; those that remain;
                                  without GPUs told here alone, not on console and page
    cost, cost_left               the same times --price
    dropped                       samples replaced, by source and reason, over all ranks and starts
    captions                      delivered, their tokens, and those cut, over all ranks, since this start or since
                                  the run went back
    epochs                        passes over each source so far
    evaluation                    of the teacher since the line before, if asked for: step, and by protocol accuracy,
                                  interval, n, chance and what could not be read; or None and the reason
    skipped_steps                 that the guard refused
"""

from pretrain.monitor.log import LOG
from pretrain.monitor.monitor import Monitor

__all__ = ["LOG", "Monitor"]
