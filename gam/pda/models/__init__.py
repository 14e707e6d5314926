"""The models that answer: local weights, or a server."""

from __future__ import annotations

from gam.pda.models.base import Generation, Model

__all__ = ["Generation", "Model", "is_server", "open_model"]


def open_model(source: str, dtype: str = "auto") -> Model:
    """Return a model from its name.

    Args:
        source: A folder of weights, a Hub id ``user/name[@revision]``, or ``NAME@URL`` for the
            model NAME of a server that speaks OpenAI's protocol, such as
            ``qwen@http://localhost:8000/v1``.
        dtype: Of local weights.
    """
    if is_server(source):
        from gam.pda.models.server import Server

        name, _, url = source.partition("@")
        return Server(name, url)
    from gam.pda.models.local import Local

    return Local.load(source, dtype)


def is_server(source: str) -> bool:
    """Tell whether a model's name is ``NAME@URL`` of a server."""
    return source.partition("@")[2].startswith(("http://", "https://"))
