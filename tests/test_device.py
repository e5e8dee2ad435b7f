"""Which backend a call gets, and what it says where none fits."""

from __future__ import annotations

import pathlib
import tomllib
import types

import jax
import jax.numpy as jnp
import pytest

import jax_moe
import jax_moe.tune
from jax_moe import backends, jax_window
from jax_moe.device import Device, device_of, interpret_params
from pallas_kernels import device
from tests.moe_inputs import SMALL, make_inputs

CPU = Device("cpu")
HOPPER = Device("gpu", "9.0")


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the kernel backends, so that the choice is tested and not what is installed."""

    def backend(name, fits):
        return types.SimpleNamespace(
            NAME=name,
            unsupported_reason=lambda platform, capability: (
                None if platform == "gpu" and fits(float(capability)) else f"needs {name}'s GPU"
            ),
        )

    stand_ins = {
        "mosaic": backend("mosaic", lambda capability: capability == 9.0),
        "triton": backend("triton", lambda capability: capability >= 8.9),
    }
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: stand_ins.get(name) or load(name))
    return stand_ins


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (CPU, "xla"),
        (Device("tpu"), "xla"),
        (HOPPER, "mosaic"),
        (Device("gpu", "8.0"), "xla"),
        (Device("gpu", "8.9"), "triton"),
        (Device("gpu", "10.0"), "triton"),
        (Device("gpu", "12.0"), "triton"),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_auto_takes_the_best(device, expected):
    assert backends.select("auto", device) == expected
    assert backends.select("xla", device) == "xla"


@pytest.mark.usefixtures("kernels")
def test_an_unsupported_choice_says_what_was_found():
    with pytest.raises(NotImplementedError, match=r"backend='mosaic': needs .* \(got: cpu\)"):
        backends.select("mosaic", CPU)
    with pytest.raises(NotImplementedError, match=r"got: gpu with compute capability 8\.0"):
        backends.select("triton", Device("gpu", "8.0"))


def test_mosaic_is_refused_on_a_cpu():
    with (
        jax_moe.assume_device("cpu"),
        pytest.raises(NotImplementedError, match=r"backend='mosaic'.*\(got: cpu\)"),
    ):
        jax_moe.apply(*make_inputs(3).arguments, config=SMALL, backend="mosaic")


def test_a_missing_dependency_is_a_reason_not_an_error(monkeypatch):
    def load(name):
        if name == "xla":
            return backends_load(name)
        raise ImportError(f"No module named '{name}_runtime'")

    backends_load = backends.load
    monkeypatch.setattr(backends, "load", load)
    assert backends.select("auto", HOPPER) == "xla"
    with pytest.raises(NotImplementedError, match="No module named 'triton_runtime'"):
        backends.select("triton", HOPPER)
    with jax_moe.assume_device("sm_90"):
        assert "No module named 'mosaic_runtime'" in jax_moe.describe()


@pytest.mark.parametrize("version", ["0.11.1", "0.11.2", "0.12.0.1", "0.12.0.dev2026"])
def test_a_jax_of_the_window_is_no_warning(monkeypatch, version):
    monkeypatch.setattr(jax, "__version__", version)
    jax_window.warn_outside()  # warnings are errors


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0", "0.13.0", "1.0.0"])
def test_another_jax_is_one_warning_that_names_the_window(monkeypatch, version):
    monkeypatch.setattr(jax, "__version__", version)
    with pytest.warns(UserWarning, match=rf"JAX 0\.11\.1 to 0\.12\.x, got {version}") as seen:
        jax_window.warn_outside()
    assert len(seen) == 1
    assert backends.select("xla", CPU) == "xla"


def test_the_package_asks_for_the_window_and_gpus_for_what_is_measured():
    project = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())
    oldest = ".".join(map(str, jax_window.OLDEST))
    major, minor = jax_window.NEWEST
    assert f"jax>={oldest},<{major}.{minor + 1}" in project["project"]["dependencies"]
    for extra in ("cuda12", "cuda13"):
        wanted = [f"jax[{extra}]>={oldest},<0.12"]
        assert project["project"]["optional-dependencies"][extra] == wanted


@pytest.mark.usefixtures("kernels")
def test_describe_names_device_choice_and_reasons():
    with jax_moe.assume_device("sm_89"):
        device, mosaic, triton, xla = jax_moe.describe().splitlines()
    assert device == "device: gpu with compute capability 8.9"
    assert mosaic.split(maxsplit=1) == ["mosaic", "needs mosaic's GPU"]
    assert triton.split(maxsplit=1) == ["triton", "chosen by auto"]
    assert xla.split(maxsplit=1) == ["xla", "available"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sm_90", HOPPER), ("sm_90a", HOPPER), ("sm_100", Device("gpu", "10.0")), ("cpu", CPU)],
)
def test_assume_device(name, expected):
    before = device_of()
    with jax_moe.assume_device(name):
        assert device_of(jnp.zeros(3)) == expected
    assert device_of() == before


@pytest.mark.parametrize(
    "name",
    ["hopper", "sm_", "sm_9", "90", "", None, 90, "sm_٩٠", "sm_²0", "sm_09", "sm_" + "9" * 21],
)
def test_assume_device_refuses_other_names(name):
    error = ValueError if isinstance(name, str) else TypeError
    with (
        pytest.raises(error, match='name: expected "cpu" or "sm_<capability>"'),
        jax_moe.assume_device(name),
    ):
        pass


@pytest.mark.parametrize(
    ("params", "got"), [(3, r"3 \(int\)"), (True, r"True \(bool\)"), ({}, r"\{\} \(dict\)")]
)
def test_interpret_mode_refuses_other_parameters(params, got):
    said = f"^params: expected a .*InterpretGPUParams or None, got {got}"
    with pytest.raises(TypeError, match=said), jax_moe.interpret_mode(params):
        pass


def test_contexts_retrace_what_was_jitted_outside():
    seen = []
    function = jax.jit(lambda x: seen.append((device_of(), interpret_params())) or x)
    function(1.0)
    with jax_moe.assume_device("sm_89"):
        function(1.0)
    with jax_moe.interpret_mode():
        function(1.0)
    function(1.0)
    outside, assumed, interpreted = seen
    assert outside[1] is None
    assert assumed == (Device("gpu", "8.9"), None)
    assert interpreted[0] == Device("gpu", "9.0", interpreted=True)
    assert interpreted[1] is not None
    assert "interpreted" in str(interpreted[0])


def test_the_device_of_concrete_arrays_counts():
    with jax.default_device(jax.devices("cpu")[0]):
        assert device_of() == CPU
        assert device_of({"x": jnp.zeros(3)}, None, 1.0) == CPU


def test_the_tuner_says_once_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(device, "local_gpu", lambda: None)
    assert jax_moe.tune.main([]) == 1
    assert capsys.readouterr().err == "jax_moe.tune: needs an NVIDIA GPU, and JAX sees none\n"
