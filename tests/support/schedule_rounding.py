"""How far timesteps may be from those of diffusers."""

#: Fractional timesteps are interpolated between float32 logarithms of sigma. On some processors (AMD's with AVX-512)
#: NumPy's last bit of those is another than elsewhere, and the distance of two neighbours magnifies it.
TIMESTEP_ROUNDING = 1e-6
