"""Makes one loaded model cheaper to train, not its class, and proves on that model that nothing else changed."""

from .loss import (
    IGNORE,
    KERNEL,
    LossRows,
    NotMaskable,
    is_encoder_decoder,
    masked_loss,
    next_labels,
    next_weights,
    own_loss,
    project_loss_rows,
    shifts_labels,
)
from .loss_proof import FLOOR, GRADIENT_CHECK, GRADIENT_FACTOR, LOSS_CHECK, LOSS_FACTOR, prove_masked_loss, prove_step
from .model import KERNELS, find_candidates, kernel_problems, patch_model
from .proof import Candidate, Proof, has_dropout, prove, record_calls, undisturbed
from .record import Patch, Patches, patches, plain, plain_model

__all__ = ["Candidate", "FLOOR", "GRADIENT_CHECK", "GRADIENT_FACTOR", "IGNORE", "KERNEL", "KERNELS", "LOSS_CHECK",
           "LOSS_FACTOR", "LossRows", "NotMaskable", "Patch", "Patches", "Proof", "find_candidates",
           "has_dropout", "is_encoder_decoder", "kernel_problems", "masked_loss", "next_labels", "next_weights", "own_loss", "patch_model",
           "patches", "plain", "plain_model", "project_loss_rows", "prove", "prove_masked_loss", "prove_step",
           "record_calls", "shifts_labels", "undisturbed"]
