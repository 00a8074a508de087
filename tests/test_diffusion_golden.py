"""The diffusion process and its single steps against the golden numbers."""

import numpy as np
import pytest
import torch

from glide_text2im.gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from glide_text2im.model_creation import create_gaussian_diffusion
from glide_text2im.respace import space_timesteps
from golden_data import deviation, load, seeded_randn_like

SPEC, DATA = load("diffusion")
STEPS, TOLERANCE, RESULTS = SPEC["steps"], SPEC["tolerance"], SPEC["results"]
X_START, X_T, NOISE, MODEL_OUTPUT = (
    torch.from_numpy(DATA[name]) for name in ("x_start", "x_t", "noise", "model_output")
)


def per_timestep(ts: torch.Tensor) -> torch.Tensor:
    return 0.001 * ts.float().view(-1, 1, 1, 1)


def model(x, ts):
    return MODEL_OUTPUT + per_timestep(ts)


def cond_fn(x, ts):
    return 0.1 * x * (1 + per_timestep(ts))


def halve(x):
    return 0.5 * x + 0.1


def kept(num_timesteps, respacing):
    """The sorted timesteps, or the name of the error."""
    try:
        return sorted(space_timesteps(num_timesteps, respacing))
    except ValueError:
        return "ValueError"


def test_a_respacing_without_sections_is_told():
    with pytest.raises(ValueError, match="has no sections"):
        space_timesteps(STEPS, [])


@pytest.mark.parametrize("schedule", SPEC["schedules"])
@pytest.mark.parametrize("table", SPEC["tables"])
def test_a_schedule_gives_the_reference_tables(schedule, table):
    betas = get_named_beta_schedule(schedule, STEPS)
    assert deviation(betas, DATA[f"{schedule}/named_betas"]) <= TOLERANCE["atol_float64"]

    got = getattr(create_gaussian_diffusion(STEPS, schedule, ""), table)

    assert got.dtype == np.float64
    assert deviation(got, DATA[f"{schedule}/{table}"]) <= TOLERANCE["atol_float64"]


@pytest.mark.parametrize("schedule", SPEC["schedules"])
@pytest.mark.parametrize("respacing", SPEC["respacings"])
def test_respacing_gives_the_reference_timesteps_and_betas(schedule, respacing):
    diffusion = create_gaussian_diffusion(STEPS, schedule, respacing)
    want = f"{schedule}/respacing {respacing}"

    assert diffusion.timestep_map == DATA[f"{want}/timestep_map"].tolist()
    assert deviation(diffusion.betas, DATA[f"{want}/betas"]) <= TOLERANCE["atol_float64"]
    assert np.array_equal(GaussianDiffusion(betas=diffusion.betas).betas, diffusion.betas)


@pytest.mark.parametrize("respacing", SPEC["more_respacings"])
def test_a_respacing_string_keeps_the_reference_timesteps(respacing):
    assert kept(STEPS, respacing) == RESULTS["timesteps"][respacing]


@pytest.mark.parametrize(
    ("call", "want"),
    list(zip(SPEC["space_timesteps_calls"], RESULTS["space_timesteps_results"], strict=True)),
    ids=str,
)
def test_space_timesteps_takes_strings_and_lists_for_any_number_of_steps(call, want):
    assert kept(*call) == want


@pytest.mark.parametrize("respacing", SPEC["invalid_respacings"])
def test_a_bad_respacing_is_refused_as_in_the_reference(respacing):
    assert kept(STEPS, respacing) == RESULTS["invalid_space_timesteps"][respacing]

    # The reference stumbles over too few timesteps (AssertionError, IndexError); here it is said.
    with pytest.raises(ValueError, match=r"respac|ddim") as error:
        create_gaussian_diffusion(STEPS, "linear", respacing)
    assert "\n" not in str(error.value)


def named(values, last="log_variance"):
    return dict(zip(("mean", "variance", last), values, strict=True))


def timesteps_seen(d, t):
    seen = []
    d.p_mean_variance(lambda x, ts: seen.append(ts) or model(x, ts), X_T, t)
    assert seen[0].dtype == torch.int64
    return seen[0]


OPERATIONS = {
    "q_sample": lambda d, t: d.q_sample(X_START, t, noise=NOISE),
    "q_mean_variance": lambda d, t: named(d.q_mean_variance(X_START, t)),
    "q_posterior": lambda d, t: named(
        d.q_posterior_mean_variance(X_START, X_T, t), "log_variance_clipped"
    ),
    "p_mean_variance clip": lambda d, t: d.p_mean_variance(model, X_T, t, clip_denoised=True),
    "p_mean_variance noclip": lambda d, t: d.p_mean_variance(model, X_T, t, clip_denoised=False),
    "p_mean_variance denoised_fn": lambda d, t: d.p_mean_variance(model, X_T, t, denoised_fn=halve),
    "timesteps_seen_by_model": timesteps_seen,
    "condition_mean": lambda d, t: d.condition_mean(
        cond_fn, d.p_mean_variance(model, X_T, t), X_T, t, model_kwargs={}
    ),
    "condition_score": lambda d, t: d.condition_score(
        cond_fn, d.p_mean_variance(model, X_T, t), X_T, t, model_kwargs={}
    ),
    "ddim_sample noclip": lambda d, t: d.ddim_sample(model, X_T, t, clip_denoised=False),
    "ddim_reverse_sample": lambda d, t: d.ddim_reverse_sample(model, X_T, t),
    "ddim_sample eta 0.7 cond": lambda d, t: d.ddim_sample(
        model, X_T, t, eta=0.7, cond_fn=cond_fn, model_kwargs={}
    ),
    "p_sample": lambda d, t: d.p_sample(model, X_T, t),
    "p_sample cond": lambda d, t: d.p_sample(model, X_T, t, cond_fn=cond_fn, model_kwargs={}),
}


@pytest.mark.parametrize("schedule", SPEC["schedules"])
@pytest.mark.parametrize("respacing", SPEC["ops_respacings"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_gives_the_reference_numbers(schedule, respacing, operation):
    diffusion = create_gaussian_diffusion(STEPS, schedule, respacing)
    t = torch.tensor(SPEC["ops_t"] if respacing else SPEC["ops_t_full"])
    with seeded_randn_like("diffusion/step"):
        got = OPERATIONS[operation](diffusion, t)
    got = got if isinstance(got, dict) else {"": got}
    name = f"ops/{schedule}/{respacing}/{operation}"
    want = {
        key[len(name) :].strip("/"): DATA[key] for key in DATA if f"{key}/".startswith(f"{name}/")
    }

    eps_is_derived_again = "ddim" in operation or operation == "condition_score"
    limit = TOLERANCE["atol_rederived_eps" if eps_is_derived_again else "atol"]
    assert want
    for key, array in want.items():
        assert deviation(got[key], array) <= (0 if array.dtype == np.int64 else limit), key


def test_every_operation_of_the_golden_file_is_tested():
    assert {key.split("/")[3] for key in DATA if key.startswith("ops/")} == set(OPERATIONS)


def test_the_second_item_of_a_tuple_output_is_returned_as_extra():
    diffusion = create_gaussian_diffusion(STEPS, "linear", "10")
    t = torch.tensor(SPEC["ops_t"])

    out = diffusion.p_mean_variance(lambda x, ts: (MODEL_OUTPUT, "extra"), X_T, t)

    assert sorted(out) == RESULTS["p_mean_variance keys"]
    assert out["extra"] == "extra"
