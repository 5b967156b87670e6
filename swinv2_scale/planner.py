"""What a configuration takes, before it runs."""


def state_bytes(parameters: int, *, zero_stage: int, precision: str, ranks: int, ema: bool) -> dict[str, float]:
    """Bytes on each rank that last from step to step, and those of the step itself, by what they are for.

    weights     in their training type; ZeRO 3 divides them
    gradients   accumulated in float32, which ZeRO 2 and 3 divide; and those of one backward pass in the training type
    optimizer   float32 master weights and AdamW's two moments, and the average of the weights; ZeRO 1 to 3 divide them
    step        the gradients of a rank's own part once more, in one piece, while the optimiser takes its step
    Parameters that stay float32 at 16 bits (norms, biases of position, scales: 1 % of them) are counted as the others.
    """
    share = 1 / ranks
    low = 4 if precision == "fp32" else 2
    return {
        "weights": parameters * low * (share if zero_stage == 3 else 1),
        "gradients": parameters * (4 * (share if zero_stage >= 2 else 1) + (low if low == 2 else 0)),
        "optimizer": parameters * ((12 if zero_stage else 8) + 4 * ema) * (share if zero_stage else 1),
        "step": parameters * 4 * share if zero_stage else 0.0,
    }
