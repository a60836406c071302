"""losses.py: numbers worked by hand, what the papers say must hold exactly, and finite differences.

The numbers are chosen so that no calculator is needed: β h = ln 3 means p̂ = σ(ln 3) = 3 / (1 + 3) = ¾. "Exact check n" is
the list at the end of each paper's section in our notes; those that speak of weights go through a real network.
"""
import copy
import math
from types import SimpleNamespace

import pytest
import torch

import data
import losses
import tiny

LN2, LN3 = math.log(2), math.log(3)
HALF, QUARTER = 0.5, 0.25


def t(*numbers, dtype=torch.float64, grad=False):
    return torch.tensor(numbers, dtype=dtype, requires_grad=grad)


def near(values, *expected):
    torch.testing.assert_close(values, t(*expected), rtol=0, atol=1e-12)


def slope(loss, *inputs):
    """The gradient of a loss's sum with respect to each input, None where there is none."""
    return torch.autograd.grad(loss.sum(), inputs, allow_unused=True)


# ---------------------------------------------------------------------------------------------------------------------
# By hand

def test_margins():
    """Log-ratios to the reference: y⁺ -3 - (-5) = 2, y⁻ -7 - (-6) = -1, so h = 2 - (-1) = 3. Then 0.5 - 1.5 = -1."""
    h = losses.margins((t(-3, -4), t(-7, -1)), (t(-5, -4.5), t(-6, -2.5)))
    near(h, 3, -1)


def test_sft():
    """Three tokens of probability ½, ⅕ and 1/10: -(ln ½ + ln ⅕ + ln 1/10) = ln 100."""
    near(losses.sft(t(math.log(0.5) + math.log(0.2) + math.log(0.1))), 2 * math.log(10))


def test_dpo():
    """β = ½. h = 2 ln 3: σ(ln 3) = ¾, loss ln 4/3. h = -2 ln 3: σ = ¼, loss ln 4. h = 0: σ = ½, loss ln 2."""
    near(losses.dpo(t(2 * LN3, -2 * LN3, 0), HALF), math.log(4 / 3), math.log(4), LN2)


def test_ipo():
    """β = ¼, so the target 1/(2β) is 2. h = 5: 3² = 9. h = -1: 9 too. h = 2: 0. h = 0: 1/(4β²) = 4."""
    near(losses.ipo(t(5, -1, 2, 0), QUARTER), 9, 9, 0, 4)


def test_refinement():
    """β = ¼. Behind p⊕x: log-ratios 2 for y⁺ and -4 for y⁻, h_p = 6, Δ = 1.5; and 1 - 3 = -2, Δ = -½."""
    augmented = losses.margins((t(-1, -1), t(-9, -2)), (t(-3, -2), t(-5, -5)))
    near(losses.refinement(augmented, QUARTER), 1.5, -0.5)


def test_sr_dpo():
    """β = ½, λ = ¼. h = 4 ln 3, Δ = 4 ln 3: β h = ln 9, λ Δ = ln 3, the logit ln 9 - ln 3 = ln 3, loss ln 4/3.

    With a plus it would be ln 27 and a loss of ln 28/27. h = 0, Δ = 4 ln 3: the logit is -ln 3, loss ln 4.
    """
    near(losses.sr_dpo(t(4 * LN3, 0), t(4 * LN3, 4 * LN3), HALF, QUARTER), math.log(4 / 3), math.log(4))


def test_sr_ipo():
    """β = ¼, λ = ½, h = 5, Δ = 2. Printed: 5 - ½·2 - 2 = 2, squared 4. Exact: Δ/β = h_p = 8, 5 - ½·8 - 2 = -1, squared 1."""
    near(losses.sr_ipo(t(5), t(2), QUARTER, HALF), 4)
    near(losses.sr_ipo(t(5), t(2), QUARTER, HALF, "printed"), 4)
    near(losses.sr_ipo(t(5), t(2), QUARTER, HALF, "exact"), 1)
    with pytest.raises(KeyError):
        losses.sr_ipo(t(5), t(2), QUARTER, HALF, "exactly")


def test_spce():
    """β = ½, h = 2 ln 3: p̂ = ¾. p = ⅓: -(⅓ ln ¾ + ⅔ ln ¼) = ⅓ (ln 4/3 + 2 ln 4) = ⅓ ln 64/3. p = ¾: the entropy of ¾."""
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    near(losses.spce(t(2 * LN3, 2 * LN3), t(1 / 3, 0.75), HALF), math.log(64 / 3) / 3, entropy)


def test_sr_spce():
    """The logit of test_sr_dpo, ln 4·3 - ln 3 = ln 3, with p = ⅓: ⅓ ln 64/3 as in test_spce."""
    near(losses.sr_spce(t(4 * LN3), t(4 * LN3), t(1 / 3), HALF, QUARTER), math.log(64 / 3) / 3)


def test_metrics():
    """p̂: σ(½·2 ln 3) = ¾. Correct: a margin of exactly 0 orders nothing. Refined margin, h = 5, Δ = 2, β = ¼, λ = ½:
    5 - ½·2/¼ = 1, and for printed Sr-IPO 5 - ½·2 = 4."""
    near(losses.strength_hat(t(2 * LN3, 0), HALF), 0.75, 0.5)
    near(losses.correct(t(2, 0, -1, 1e-9)), 1, 0, 0, 1)
    near(losses.refined_margin(t(5), t(2), QUARTER, HALF), 1)
    near(losses.refined_margin(t(5), t(2), QUARTER, HALF, "exact"), 1)
    near(losses.refined_margin(t(5), t(2), QUARTER, HALF, "printed"), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Identities, over random margins

RANDOM = torch.Generator().manual_seed(0)
H, DELTA = (3 * torch.randn(200, generator=RANDOM, dtype=torch.float64) for _ in range(2))
P = torch.rand(200, generator=RANDOM, dtype=torch.float64)
BETA, LAM = 0.3, 0.7

LOSSES = {       # name -> loss of (h, Δ, p)
    "sft": lambda h, delta, p: losses.sft(h),
    "dpo": lambda h, delta, p: losses.dpo(h, BETA),
    "ipo": lambda h, delta, p: losses.ipo(h, BETA),
    "sr-dpo": lambda h, delta, p: losses.sr_dpo(h, delta, BETA, LAM),
    "sr-ipo": lambda h, delta, p: losses.sr_ipo(h, delta, BETA, LAM),
    "sr-ipo-exact": lambda h, delta, p: losses.sr_ipo(h, delta, BETA, LAM, "exact"),
    "spce": lambda h, delta, p: losses.spce(h, p, BETA),
    "sr-spce": lambda h, delta, p: losses.sr_spce(h, delta, p, BETA, LAM),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def value_and_slope(loss, h=H):
    h = h.clone().requires_grad_()
    value = loss(h)
    return value, slope(value, h)[0]


def assert_same(one, other, exactly=False):
    for a, b in zip(value_and_slope(one), value_and_slope(other)):
        assert torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, base", [("sr_dpo", losses.dpo), ("sr_ipo", losses.ipo)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_0_is_the_base_loss_bit_for_bit(name, base, dtype):
    """Paper 1, exact check 2."""
    refined, delta = getattr(losses, name), DELTA.to(dtype)
    assert_same(lambda h: refined(h.to(dtype), delta, BETA, 0.0), lambda h: base(h.to(dtype), BETA), exactly=True)


def test_sr_spce_holds_the_others():
    assert_same(lambda h: losses.sr_spce(h, DELTA, P, BETA, 0.0), lambda h: losses.spce(h, P, BETA), exactly=True)
    assert_same(lambda h: losses.sr_spce(h, DELTA, torch.ones(200), BETA, LAM), lambda h: losses.sr_dpo(h, DELTA, BETA, LAM))


def test_exact_sr_ipo_subtracts_the_augmented_margin():
    """Eq. 14 without the slip of eq. 15: λ Δ/β = λ h_p. Printed and exact agree where β = 1."""
    assert_same(lambda h: losses.sr_ipo(h, losses.refinement(DELTA, BETA), BETA, LAM, "exact"),
                lambda h: (h - LAM * DELTA - 1 / (2 * BETA)) ** 2)
    assert_same(lambda h: losses.sr_ipo(h, DELTA, 1.0, LAM, "exact"), lambda h: losses.sr_ipo(h, DELTA, 1.0, LAM))


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_the_naive_refinement_is_dpo_with_another_beta(lam):
    """Eq. 10 and exact check 3: Δ = β h gives -log σ((1 - λ) β h), and DPO's gradient at β(1 - λ) divided by 1 - λ."""
    value, found = value_and_slope(lambda h: losses.sr_dpo(h, losses.refinement(h, BETA), BETA, lam))
    expected, scaled = value_and_slope(lambda h: losses.dpo(h, BETA * (1 - lam)))
    assert torch.allclose(value, expected, atol=1e-12) and torch.allclose(found, scaled / (1 - lam), atol=1e-12)


def test_at_lambda_1_the_naive_gradient_never_saturates():
    """The logit is 0 whatever h is, so the slope stays at -β σ(0) = -β/2: the instability papers.md warns of."""
    _, found = value_and_slope(lambda h: losses.sr_dpo(h, losses.refinement(h, BETA), BETA, 1.0))
    assert torch.allclose(found, torch.full_like(H, -BETA / 2))


def test_slope_of_sr_dpo():
    """Paper 1, exact check 6: ∂L/∂h = -β σ(-(β h - λ Δ))."""
    _, found = value_and_slope(lambda h: losses.sr_dpo(h, DELTA, BETA, LAM))
    assert torch.allclose(found, -BETA * torch.sigmoid(LAM * DELTA - BETA * H), atol=1e-12)


def test_slope_of_spce():
    """Paper 2, eq. 9: β (p̂ - p). So zero at h = 0, p = ½."""
    _, found = value_and_slope(lambda h: losses.spce(h, P, BETA))
    assert torch.allclose(found, BETA * (losses.strength_hat(H, BETA) - P), atol=1e-12)
    h = t(0, grad=True)
    near(slope(losses.spce(h, t(0.5), BETA), h)[0], 0)


def test_stationary_points():
    """IPO at 1/(2β); Sr-IPO at 1/(2β) + λ Δ (exact check 7), the exact one at 1/(2β) + λ Δ/β; SPCE at β h = logit p."""
    target = 1 / (2 * BETA)
    points = {"ipo": torch.full_like(H, target), "sr-ipo": target + LAM * DELTA, "sr-ipo-exact": target + LAM * DELTA / BETA,
              "spce": P.logit() / BETA, "sr-spce": (P.logit() + LAM * DELTA) / BETA}
    for name, h in points.items():
        value, found = value_and_slope(lambda h: LOSSES[name](h, DELTA, P), h)
        assert found.abs().max() < 1e-12, name
        for side in (-0.1, 0.1):
            assert (LOSSES[name](h + side, DELTA, P) > value).all(), f"{name} is no minimum"


def test_certain_strength_is_dpo():
    """p = 1 gives DPO; p = 0 gives DPO with the pair swapped."""
    assert_same(lambda h: losses.spce(h, torch.ones(200), BETA), lambda h: losses.dpo(h, BETA))
    assert_same(lambda h: losses.spce(h, torch.zeros(200), BETA), lambda h: losses.dpo(-h, BETA))


def test_spce_does_not_care_which_is_named_first():
    """Swapping yʰ and yˡ turns h, Δ and p into -h, -Δ and 1 - p, and changes nothing."""
    assert_same(lambda h: losses.spce(-h, 1 - P, BETA), lambda h: losses.spce(h, P, BETA))
    assert_same(lambda h: losses.sr_spce(-h, -DELTA, 1 - P, BETA, LAM), lambda h: losses.sr_spce(h, DELTA, P, BETA, LAM))


def test_refinement_is_antisymmetric_and_telescopes():
    """Paper 1, exact check 5: Δ(y⁻,y⁺) = -Δ(y⁺,y⁻), and Prop. 3.3(i) Δ(y⁻,y⁺) = Δ(y⁻,y*) - Δ(y⁺,y*), for any y*."""
    policy, reference = (torch.randn(3, 50, generator=RANDOM, dtype=torch.float64) for _ in range(2))

    def delta(worse, better):
        return losses.refinement(losses.margins((policy[better], policy[worse]), (reference[better], reference[worse])), BETA)
    assert torch.equal(delta(0, 1), -delta(1, 0))
    assert torch.allclose(delta(0, 1), delta(0, 2) - delta(1, 2), atol=1e-12) and delta(0, 1).abs().min() > 0


@every_loss
def test_one_value_per_example(name):
    """No value depends on another example, so the caller may divide by any global count."""
    whole = LOSSES[name](H, DELTA, P)
    assert whole.shape == (200,)
    alone = torch.cat([LOSSES[name](*(x[i:i + 1] for x in (H, DELTA, P))) for i in range(200)])
    assert torch.allclose(whole, alone, rtol=1e-14)


@every_loss
def test_gradients_by_finite_differences(name):
    h = H[:20].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: LOSSES[name](h, DELTA[:20], P[:20]), h, atol=1e-7, rtol=1e-6)


@every_loss
def test_nothing_flows_into_delta_and_strength(name):
    """Both are constants to the optimizer even where the caller forgot to detach them."""
    h, delta, p = (x.clone().requires_grad_() for x in (H, DELTA, P))
    of_h, of_delta, of_p = slope(LOSSES[name](h, delta, p), h, delta, p)
    assert of_h.abs().sum() > 0 and of_delta is None and of_p is None
    assert not losses.refinement(h, BETA).requires_grad


@every_loss
def test_extremes_in_float32(name):
    """Margins of ±10⁴, far beyond what exp() of a float32 can hold: all stays finite, and the slopes are the limits.

    Where a loss is logistic, β (p̂ - p) is β, 0 or -β at once; -h has the slope -1; the squares only grow.
    """
    h, delta = t(1e4, -1e4, dtype=torch.float32, grad=True), t(-1e4, 1e4, dtype=torch.float32)
    for p in (0.0, 1.0):
        value = LOSSES[name](h, delta, torch.full_like(h, p))
        found = slope(value, h)[0]
        assert value.isfinite().all() and found.isfinite().all()
        limits = {"sft": [-1, -1], "dpo": [0, -BETA], "sr-dpo": [0, -BETA],
                  "spce": [BETA * (1 - p), -BETA * p], "sr-spce": [BETA * (1 - p), -BETA * p]}
        if name in limits:
            assert found.tolist() == pytest.approx(limits[name])
        else:
            assert found[0] > 1e4 and found[1] < -1e4


# ---------------------------------------------------------------------------------------------------------------------
# Through a network: two queries with a chosen and a rejected response each, and p in tokens that stand nowhere else

PROMPT_P = [60, 61, 62]
PAIRS = [([1, 5, 6, 7], [8, 9, 2], [8, 10, 11, 2]), ([1, 12], [13, 14, 15, 16, 2], [17, 2]), ([1, 5, 6], [20, 2], [21, 22])]


def margin_tensor(policy, reference, p):
    """h of each pair behind p⊕x, as training computes it: one forest, both networks on the same batch."""
    fronts = [x[:1] + p + x[1:] for x, _, _ in PAIRS]
    forest = data.pack([front + y for front, pair in zip(fronts, PAIRS) for y in pair[1:]])
    starts = [len(front) for front in fronts for _ in range(2)]
    with torch.no_grad():
        frozen = losses.logprobs(reference, forest, starts).view(-1, 2)
    current = losses.logprobs(policy, forest, starts).view(-1, 2)
    return losses.margins(current.unbind(1), frozen.unbind(1))


def weight_gradients(policy, loss):
    names, weights = zip(*policy.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss.sum(), weights)))


def assert_equal_gradients(one, other, atol=0.0):
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=atol), name


@pytest.fixture(params=["llama", "neox"])
def nets(request):
    return SimpleNamespace(policy=tiny.net(request.param, seed=1), reference=tiny.net(request.param, seed=2))


REFINED = {"sr_dpo": (losses.sr_dpo, losses.dpo, LN2), "sr_ipo": (losses.sr_ipo, losses.ipo, 1 / (4 * BETA ** 2))}
every_refined = pytest.mark.parametrize("name", REFINED)


@every_refined
def test_at_the_reference_refinement_changes_nothing(nets, name):
    """Paper 1, exact check 1: at π = π_ref both margins are exactly 0, the loss is ln 2 or 1/(4β²), the gradient the base's."""
    refined, base, start = REFINED[name]
    reference = copy.deepcopy(nets.policy)
    h, h_p = (margin_tensor(nets.policy, reference, p) for p in ([], PROMPT_P))
    assert (h == 0).all() and (h_p == 0).all()
    loss, plain = refined(h, losses.refinement(h_p, BETA), BETA, LAM), base(h, BETA)
    assert torch.allclose(loss, torch.full_like(h, start), atol=1e-12) and torch.equal(loss, plain)
    gradients = weight_gradients(nets.policy, loss)
    assert_equal_gradients(gradients, weight_gradients(nets.policy, base(margin_tensor(nets.policy, reference, []), BETA)))
    assert gradients["embed.weight"].abs().max() > 1e-3


@every_refined
def test_lambda_0_trains_like_the_base_loss(nets, name):
    """Paper 1, exact check 2, down to the weights."""
    refined, base, _ = REFINED[name]
    delta = losses.refinement(margin_tensor(nets.policy, nets.reference, PROMPT_P), BETA)
    h = margin_tensor(nets.policy, nets.reference, [])
    assert delta.abs().min() > 0.01
    one = weight_gradients(nets.policy, refined(h, delta, BETA, 0.0))
    h = margin_tensor(nets.policy, nets.reference, [])
    assert_equal_gradients(one, weight_gradients(nets.policy, base(h, BETA)))


def test_an_empty_refinement_prompt(nets):
    """Paper 1, exact check 3: loss -log σ((1 - λ) β h), gradient DPO's at β(1 - λ) divided by 1 - λ."""
    h, h_p = (margin_tensor(nets.policy, nets.reference, []) for _ in range(2))
    loss = losses.sr_dpo(h, losses.refinement(h_p, BETA), BETA, LAM)
    assert torch.allclose(loss, -torch.nn.functional.logsigmoid((1 - LAM) * BETA * h), atol=1e-12)
    naive = losses.dpo(margin_tensor(nets.policy, nets.reference, []), BETA * (1 - LAM)) / (1 - LAM)
    assert_equal_gradients(weight_gradients(nets.policy, loss), weight_gradients(nets.policy, naive), 1e-10)


@every_refined
def test_no_gradient_through_the_augmented_pass(nets, name):
    """Paper 1, exact check 4. The tokens of p stand nowhere else, so their embeddings learn only through p⊕x."""
    refined = REFINED[name][0]
    h, h_p = (margin_tensor(nets.policy, nets.reference, p) for p in ([], PROMPT_P))
    found = weight_gradients(nets.policy, refined(h, losses.refinement(h_p, BETA), BETA, LAM))
    assert (found["embed.weight"][PROMPT_P] == 0).all()
    h = margin_tensor(nets.policy, nets.reference, [])
    number = losses.refinement(torch.tensor(h_p.tolist(), dtype=h.dtype), BETA)            # a constant beyond doubt
    assert_equal_gradients(found, weight_gradients(nets.policy, refined(h, number, BETA, LAM)))
    leaking = weight_gradients(nets.policy, losses.dpo(h_p, BETA))                           # the control: p does matter
    assert leaking["embed.weight"][PROMPT_P].abs().max() > 1e-3


@every_refined
def test_weights_move_as_finite_differences_say(nets, name):
    """The slope along a random direction of all weights, with Δ held at its value; letting Δ move is another slope."""
    refined, policy = REFINED[name][0], nets.policy
    generator, weights = torch.Generator().manual_seed(4), list(policy.parameters())
    direction = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]

    def total(step, held=None):
        with torch.no_grad():
            for weight, d in zip(weights, direction):
                weight += step * d
            h, h_p = (margin_tensor(policy, nets.reference, p) for p in ([], PROMPT_P))
            for weight, d in zip(weights, direction):
                weight -= step * d
        delta = losses.refinement(h_p, BETA) if held is None else held
        return refined(h, delta, BETA, LAM).sum().item(), delta

    h, h_p = (margin_tensor(policy, nets.reference, p) for p in ([], PROMPT_P))
    gradients = weight_gradients(policy, refined(h, losses.refinement(h_p, BETA), BETA, LAM)).values()
    expected = sum((g * d).sum() for g, d in zip(gradients, direction)).item()
    held, epsilon = total(0)[1], 1e-6
    found = (total(epsilon, held)[0] - total(-epsilon, held)[0]) / (2 * epsilon)
    moving = (total(epsilon)[0] - total(-epsilon)[0]) / (2 * epsilon)
    assert abs(found - expected) < 1e-5 * abs(expected) and abs(moving - expected) > 1e-2 * abs(expected)


def test_spce_trains_on_probabilities_not_on_who_is_first(nets):
    """Paper 2's identities down to the weights: p = 1 is DPO's gradient, and swapping every pair with p → 1 - p is nothing."""
    def gradients(loss):
        return weight_gradients(nets.policy, loss(margin_tensor(nets.policy, nets.reference, [])))
    p = t(0.9, 0.2, 0.5)
    sure, dpo = gradients(lambda h: losses.spce(h, torch.ones(3), BETA)), gradients(lambda h: losses.dpo(h, BETA))
    assert_equal_gradients(sure, dpo, 1e-12)
    swapped, plain = gradients(lambda h: losses.spce(-h, 1 - p, BETA)), gradients(lambda h: losses.spce(h, p, BETA))
    assert_equal_gradients(swapped, plain, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of tokens; those of sequences in a forest are in test_pack.py

def head_and_hidden(M=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(6, 9, bias=False).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(9, 6, generator=generator))
    hidden = torch.randn(M, 6, generator=generator).to(dtype).requires_grad_()
    return head, hidden, torch.randint(9, (M,), generator=generator)


def test_token_logprobs_by_hand():
    """Logits ln 1, ln 2 and ln 5 are probabilities ⅛, ¼ and ⅝; doubled they are 1, 4 and 25 thirtieths."""
    head = torch.nn.Linear(1, 3, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(t(1, 2, 5).log()[:, None])
    found = losses.token_logprobs(head, t(1, 1, 2)[:, None], torch.tensor([2, 0, 1]))
    near(found.detach(), math.log(5 / 8), math.log(1 / 8), math.log(4 / 30))


@pytest.mark.parametrize("M", [1, 3, 10])
def test_chunks_change_nothing(monkeypatch, M):
    """Values and gradients in chunks of 3 are those of a plain log-softmax, and no more than 3 rows of logits exist at once."""
    head, hidden, tokens = head_and_hidden(M)
    expected = head(hidden).log_softmax(-1)[range(M), tokens]
    weights = torch.arange(1.0, M + 1, dtype=torch.float64)
    slopes = slope(expected * weights, hidden, head.weight)
    monkeypatch.setattr(losses, "HEAD_CHUNK", 3)
    rows = []
    head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    found = losses.token_logprobs(head, hidden, tokens)
    for a, b in zip((expected, *slopes), (found, *slope(found * weights, hidden, head.weight)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert max(rows) <= 3 and sum(rows) == 2 * M - ((M - 1) % 3 + 1)       # all but the last chunk again for the gradient
    with torch.no_grad():
        assert torch.equal(losses.token_logprobs(head, hidden, tokens), found)


def test_token_logprobs_by_finite_differences(monkeypatch):
    monkeypatch.setattr(losses, "HEAD_CHUNK", 2)
    head, hidden, tokens = head_and_hidden(5)

    def values(hidden, weight):
        return losses.token_logprobs(lambda x: x @ weight.T, hidden, tokens)
    assert torch.autograd.gradcheck(values, (hidden, head.weight), atol=1e-7)


def test_nothing_supervised_is_zero_with_a_graph():
    """A batch without a supervised token still takes part in the backward pass, as FSDP needs: with gradients of zero."""
    head, hidden, tokens = head_and_hidden(0)
    found = losses.token_logprobs(head, hidden, tokens)
    assert found.shape == (0,)
    assert all(g is not None and (g == 0).all() for g in slope(found, hidden, head.weight))
    net = tiny.net()
    found = losses.logprobs(net, data.pack([[1, 5, 6], [1, 5, 7]]), [3, 3])
    assert found.tolist() == [0, 0]
    assert all((g == 0).all() for g in weight_gradients(net, losses.dpo(found, BETA)).values())
    some = losses.logprobs(net, data.pack([[1, 5, 6], [1, 5, 7]]), [3, 2])
    assert some[0] == 0 and some[1] < -0.01


def test_low_precision_logits_are_normalised_in_float32():
    """2,048 equal logits in bfloat16: log 1/2048 = -7.6246; a sum kept in bfloat16 is off by more than 0.01."""
    head = torch.nn.Linear(4, 2048, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        head.weight.fill_(0.5)
    found = losses.token_logprobs(head, torch.ones(3, 4, dtype=torch.bfloat16), torch.tensor([0, 5, 2047]))
    assert found.dtype == torch.float32 and torch.allclose(found, torch.full((3,), -math.log(2048)), atol=1e-5)


def test_extreme_logits():
    """Logits of ±1e4 in float32: the likely token has log-probability 0, the others -2e4, and no gradient is nan."""
    head = torch.nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [-1e4], [-1e4]]))
    hidden = torch.ones(2, 1, requires_grad=True)
    found = losses.token_logprobs(head, hidden, torch.tensor([0, 1]))
    assert found.tolist() == [0, -2e4]
    assert all(g.isfinite().all() for g in slope(found, hidden, head.weight))
