"""Names of widths in logs and metrics."""


def width_name(width: float) -> str:
    """0.5 -> `width_0.50`; as many decimals as the width has, but two at least."""
    return f'width_{width:.2f}' if round(width, 2) == width else f'width_{width:g}'
