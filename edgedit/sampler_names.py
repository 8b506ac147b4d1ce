"""The names of samplers, and the spellings that people type for them."""

from __future__ import annotations

from edgedit.errors import InputError

__all__ = ["SAMPLERS", "SIGMA_SPACINGS", "resolve_sampler"]

SAMPLERS: dict[str, str] = {
    "euler": "Euler, first order (the same update as DDIM)",
    "ddim": "DDIM, first order, optional noise (eta)",
    "euler_ancestral": "Euler ancestral, adds noise at every step",
    "dpmpp_2m": "DPM-Solver++ multistep, second order",
    "dpmpp_2m_sde": "DPM-Solver++ multistep, second order, adds noise at every step",
    "unipc": "UniPC predictor and corrector, second order",
    "heun": "Heun, second order, two evaluations a step",
    "ddpm": "DDPM ancestral sampling",
    "lcm": "latent consistency: clean estimate, then fresh noise",
    "tcd": "trajectory consistency, gamma (eta) between deterministic and fresh noise",
    "scm": "continuous-time consistency on the TrigFlow path (SANA-Sprint)",
    "dmd": "one-step or few-step clean estimate with fresh noise between (DMD, SwiftBrush, SIM)",
}
"""Canonical sampler names, with one line each for help texts."""

SIGMA_SPACINGS = ("table", "karras", "exponential", "beta", "lu")
"""How noise levels are spread between the largest and the smallest; "table" follows the timesteps."""

_ALIASES = {
    "keuler": "euler",
    "eulerdiscrete": "euler",
    "flowmatcheuler": "euler",
    "flowmatcheulerdiscrete": "euler",
    "floweuler": "euler",
    "eulera": "euler_ancestral",
    "keulera": "euler_ancestral",
    "keulerancestral": "euler_ancestral",
    "eulerancestraldiscrete": "euler_ancestral",
    "dpmpp": "dpmpp_2m",
    "kdpmpp2m": "dpmpp_2m",
    "dpm2m": "dpmpp_2m",
    "dpmsolver": "dpmpp_2m",
    "dpmsolverpp": "dpmpp_2m",
    "dpmsolvermultistep": "dpmpp_2m",
    "flowdpmsolver": "dpmpp_2m",
    "kdpmpp2msde": "dpmpp_2m_sde",
    "sdedpmsolverpp": "dpmpp_2m_sde",
    "unipcmultistep": "unipc",
    "kheun": "heun",
    "heundiscrete": "heun",
    "flowmatchheun": "heun",
    "flowmatchheundiscrete": "heun",
    "flowmatchlcm": "lcm",
    "scmtrigflow": "scm",
}


def _squash(name: str) -> str:
    text = name.strip().lower().replace("++", "pp")
    return "".join(character for character in text if character.isalnum()).removesuffix("scheduler")


_BY_SPELLING = {_squash(name): name for name in SAMPLERS} | _ALIASES


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """The canonical name of a sampler, and the sigma spacing that the spelling asks for.

    Case, spaces, hyphens and underscores do not matter: `"DPM++ 2M Karras"` gives `("dpmpp_2m", "karras")`,
    `"euler a"` gives `("euler_ancestral", None)`. Class names of diffusers schedulers are accepted too.

    Raises `InputError` for a name that is not known, with the list of those that are.
    """
    spelling = _squash(name)
    if spelling in _BY_SPELLING:
        return _BY_SPELLING[spelling], None
    for spacing in SIGMA_SPACINGS[1:]:
        stem = _squash(spelling.removesuffix(spacing))
        if spelling.endswith(spacing) and stem in _BY_SPELLING:
            return _BY_SPELLING[stem], spacing
    raise InputError(f"unknown sampler {name!r}; choose one of: {', '.join(SAMPLERS)}")
