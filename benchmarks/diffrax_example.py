"""The example `neural_ode` of diffrax: MLP of width 64, AdaBelief at 3e-3, 500 steps on a tenth, 500 on all."""

# pyright: reportMissingImports=false
# diffrax is no dependency; this runs where it is installed.

from __future__ import annotations

import importlib.util
import time

from flows.datasets import DynamicalSystem

STEPS, RATE, BATCH, WIDTH = 500, 3e-3, 32, 64
PACKAGES = ("diffrax", "equinox", "optax")


def beside(data: DynamicalSystem, seed: int) -> str:
    """What to print of diffrax beside ours."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        return f"{', '.join(missing)} not installed"
    loss, seconds, compiling = train(data, seed)
    return f"diffrax {loss:.5f} in {seconds:.0f} s, and {compiling:.0f} s to compile"


def train(data: DynamicalSystem, seed: int) -> tuple[float, float, float]:
    """The mean square error over all training states, and the CPU seconds of steps and of compilation."""
    import diffrax
    import equinox
    import jax
    import jax.numpy as jnp
    import optax

    batch = data.part("train")
    times, states = jnp.asarray(batch.times[0].numpy(), "float32"), jnp.asarray(batch.x.numpy(), "float32")
    draw, key = jax.random.split(jax.random.PRNGKey(seed))
    model = equinox.nn.MLP(2, 2, WIDTH, 2, jax.nn.softplus, key=key)
    control = diffrax.PIDController(rtol=1e-3, atol=1e-6)

    def solve(model, times, start):
        term = diffrax.ODETerm(lambda t, x, args: model(x))
        first, last = times[0], times[-1]
        saved = diffrax.SaveAt(ts=times)
        step = times[1] - times[0]
        found = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), first, last, step, start, stepsize_controller=control, saveat=saved
        )
        return found.ys

    def loss(model, times, states):
        predicted = jax.vmap(solve, in_axes=(None, None, 0))(model, times, states[:, 0])
        return jnp.mean((predicted - states) ** 2)

    optimizer = optax.adabelief(RATE)

    @equinox.filter_jit
    def step(model, moments, times, states):
        gradients = equinox.filter_grad(loss)(model, times, states)
        updates, moments = optimizer.update(gradients, moments)
        return equinox.apply_updates(model, updates), moments

    seconds = compiling = 0.0
    for length in (len(times) // 10, len(times)):
        moments = optimizer.init(equinox.filter(model, equinox.is_inexact_array))
        for i in range(STEPS):
            draw, key = jax.random.split(draw)
            chosen = states[jax.random.choice(key, len(states), (BATCH,), replace=False), :length]
            begin = time.process_time()
            model, moments = jax.block_until_ready(step(model, moments, times[:length], chosen))
            if i:
                seconds += time.process_time() - begin
            else:
                compiling += time.process_time() - begin
    return float(loss(model, times, states)), seconds, compiling
