"""losses.py: numbers worked by hand, what the papers say must hold exactly, and finite differences.

The numbers are chosen so that no calculator is needed: β h = ln 3 means p̂ = σ(ln 3) = 3 / (1 + 3) = ¾.
"Exact check n" counts what must hold exactly in paper 1; what speaks of weights goes through a real network.
"""
import copy
import math
from types import SimpleNamespace

import pytest
import torch

import data
import losses
import tiny
from losses import dpo, ipo, refinement, sft, spce, sr_dpo, sr_ipo, sr_spce
from recipes import RECIPES

LN2, LN3 = math.log(2), math.log(3)
HALF, QUARTER = 0.5, 0.25


def t(*numbers, dtype=torch.float64, grad=False):
    return torch.tensor(numbers, dtype=dtype, requires_grad=grad)


def near(values, *expected):
    torch.testing.assert_close(values, t(*expected), rtol=0, atol=1e-12)


def slope(loss, *inputs):
    """The gradient of a loss's sum with respect to each input, None where there is none."""
    return torch.autograd.grad(loss.sum(), inputs, allow_unused=True)


# ------------------------------------------------------------------------------------------------------------
# By hand

BY_HAND = {
    # Log-ratios: y⁺ -3 - (-5) = 2, y⁻ -7 - (-6) = -1, so h = 2 - (-1) = 3. Then 0.5 - 1.5 = -1.
    "margins": (losses.margins((t(-3, -4), t(-7, -1)), (t(-5, -4.5), t(-6, -2.5))), 3, -1),
    # Three tokens of probability ½, ⅕ and 1/10: -(ln ½ + ln ⅕ + ln 1/10) = ln 100.
    "sft": (sft(t(math.log(0.5) + math.log(0.2) + math.log(0.1))), 2 * math.log(10)),
    # β = ½. h = 2 ln 3: σ(ln 3) = ¾, loss ln 4/3. h = -2 ln 3: σ = ¼, loss ln 4. h = 0: σ = ½, loss ln 2.
    "dpo": (dpo(t(2 * LN3, -2 * LN3, 0), HALF), math.log(4 / 3), math.log(4), LN2),
    # β = ¼, so the target 1/(2β) is 2. h = 5: 3² = 9. h = -1: 9 too. h = 2: 0. h = 0: 1/(4β²) = 4.
    "ipo": (ipo(t(5, -1, 2, 0), QUARTER), 9, 9, 0, 4),
    # β = ¼. After p⊕x: log-ratios 2 for y⁺ and -4 for y⁻, h_p = 6, Δ = 1.5; and 1 - 3 = -2, Δ = -½.
    "refinement": (refinement(t(6, -2), QUARTER), 1.5, -0.5),
    # β = ½, λ = ¼. h = Δ = 4 ln 3: β h = ln 9, λ Δ = ln 3, the logit ln 9 - ln 3 = ln 3, loss ln 4/3. With a
    # plus it would be ln 27 and a loss of ln 28/27. h = 0, Δ = 4 ln 3: the logit is -ln 3, loss ln 4.
    "sr_dpo": (sr_dpo(t(4 * LN3, 0), t(4 * LN3, 4 * LN3), HALF, QUARTER), math.log(4 / 3), math.log(4)),
    # β = ¼, λ = ½, h = 5, Δ = 2: 5 - ½·2 - 2 = 2, squared 4. Exact: Δ/β = h_p = 8, (5 - ½·8 - 2)² = 1.
    "sr_ipo": (sr_ipo(t(5), t(2), QUARTER, HALF), 4),
    "sr_ipo, printed": (sr_ipo(t(5), t(2), QUARTER, HALF, "printed"), 4),
    "sr_ipo, exact": (sr_ipo(t(5), t(2), QUARTER, HALF, "exact"), 1),
    # β = ½, h = 2 ln 3: p̂ = ¾. p = ⅓: -(⅓ ln ¾ + ⅔ ln ¼) = ⅓ ln 64/3. p = ¾: its entropy, ln 4 - ¾ ln 3.
    "spce": (spce(t(2 * LN3, 2 * LN3), t(1 / 3, 0.75), HALF), math.log(64 / 3) / 3, 2 * LN2 - 0.75 * LN3),
    # The logit of sr_dpo, ln 3, with p = ⅓: ⅓ ln 64/3 as in spce.
    "sr_spce": (sr_spce(t(4 * LN3), t(4 * LN3), t(1 / 3), HALF, QUARTER), math.log(64 / 3) / 3),
    # σ(½·2 ln 3) = ¾. A margin of exactly 0 orders nothing.
    "strength_hat": (losses.strength_hat(t(2 * LN3, 0), HALF), 0.75, 0.5),
    "correct": (losses.correct(t(2, 0, -1, 1e-9)), 1, 0, 0, 1),
    # h = 5, Δ = 2, β = ¼, λ = ½: 5 - ½·2/¼ = 1, and for printed Sr-IPO 5 - ½·2 = 4.
    "refined_margin": (losses.refined_margin(t(5), t(2), QUARTER, HALF), 1),
    "refined_margin, exact": (losses.refined_margin(t(5), t(2), QUARTER, HALF, "exact"), 1),
    "refined_margin, printed": (losses.refined_margin(t(5), t(2), QUARTER, HALF, "printed"), 4),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    near(*BY_HAND[name])


@pytest.mark.parametrize("recipe, delta_scale, refined", [
    ("sr-dpo", "printed", 4), ("sr-spce", "exact", 4), ("sr-ipo", "exact", 4), ("sr-ipo", "printed", 10)])
def test_pair_metrics(recipe, delta_scale, refined):
    """β = ¼, λ = ½. h = 12, h_p = 16, Δ = 4: 12 - ½·4/¼ = 4, printed Sr-IPO 12 - ½·4 = 10. The second pair,
    h = -4 ln 3 and p̂ = ¼, is ordered wrongly after x and rightly after p⊕x."""
    settings = SimpleNamespace(recipes=RECIPES, recipe=recipe, delta_scale=delta_scale, beta=QUARTER,
                               lam=HALF)
    h, h_p, p, policy = t(12, -4 * LN3), t(16, 4), t(0.9, 0.2), (t(-3, -9), t(-8, -2))
    plain = losses.pair_metrics(settings, t(7, 8), h, None, None, None, policy)
    expected = {"loss": (7, 8), "margin": (12, -4 * LN3), "accuracy": (1, 0), "chosen_logp": (-3, -9),
                "rejected_logp": (-8, -2)}
    assert {name: tuple(values.tolist()) for name, values in plain.items()} == expected
    found = losses.pair_metrics(settings, t(7, 8), h, h_p, refinement(h_p, QUARTER), p, policy)
    assert found.keys() == {*plain, "augmented_accuracy", "refined_margin", "p", "p_hat"}
    near(found["augmented_accuracy"], 1, 1)
    near(found["refined_margin"][:1], refined)
    near(found["p"], 0.9, 0.2)
    near(found["p_hat"], 1 / (1 + math.exp(-3)), 0.25)


# ------------------------------------------------------------------------------------------------------------
# Identities, over random margins

RANDOM = torch.Generator().manual_seed(0)
H, DELTA = (3 * torch.randn(200, generator=RANDOM, dtype=torch.float64) for _ in range(2))
P = torch.rand(200, generator=RANDOM, dtype=torch.float64)
ONE, ZERO = torch.ones(200), torch.zeros(200)
BETA, LAM = 0.3, 0.7

LOSSES = {       # name -> loss of (h, Δ, p)
    "sft": lambda h, delta, p: sft(h),
    "dpo": lambda h, delta, p: dpo(h, BETA),
    "ipo": lambda h, delta, p: ipo(h, BETA),
    "sr-dpo": lambda h, delta, p: sr_dpo(h, delta, BETA, LAM),
    "sr-ipo": lambda h, delta, p: sr_ipo(h, delta, BETA, LAM),
    "sr-ipo-exact": lambda h, delta, p: sr_ipo(h, delta, BETA, LAM, "exact"),
    "spce": lambda h, delta, p: spce(h, p, BETA),
    "sr-spce": lambda h, delta, p: sr_spce(h, delta, p, BETA, LAM),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def value_and_slope(loss, h=H):
    h = h.clone().requires_grad_()
    value = loss(h)
    return value, slope(value, h)[0]


SAME = {         # what is the same loss, with the same slope, for any h
    "λ = 0 is DPO, exact check 2": (lambda h: sr_dpo(h, DELTA.to(h), BETA, 0.0), lambda h: dpo(h, BETA)),
    "λ = 0 is IPO, exact check 2": (lambda h: sr_ipo(h, DELTA.to(h), BETA, 0.0), lambda h: ipo(h, BETA)),
    "λ = 0 is SPCE": (lambda h: sr_spce(h, DELTA.to(h), P, BETA, 0.0), lambda h: spce(h, P, BETA)),
    "p = 1 is Sr-DPO": (lambda h: sr_spce(h, DELTA, ONE, BETA, LAM), lambda h: sr_dpo(h, DELTA, BETA, LAM)),
    "p = 1 is DPO": (lambda h: spce(h, ONE, BETA), lambda h: dpo(h, BETA)),
    "p = 0 is DPO with the pair swapped": (lambda h: spce(h, ZERO, BETA), lambda h: dpo(-h, BETA)),
    "SPCE does not care which response is named first": (
        lambda h: spce(-h, 1 - P, BETA), lambda h: spce(h, P, BETA)),
    "nor does Sr-SPCE, with -Δ": (
        lambda h: sr_spce(-h, -DELTA, 1 - P, BETA, LAM), lambda h: sr_spce(h, DELTA, P, BETA, LAM)),
    "exact Sr-IPO subtracts λ h_p: eq. 14 without the slip of eq. 15": (
        lambda h: sr_ipo(h, refinement(DELTA, BETA), BETA, LAM, "exact"),
        lambda h: (h - LAM * DELTA - 1 / (2 * BETA)) ** 2),
    "printed is exact where β = 1": (
        lambda h: sr_ipo(h, DELTA, 1.0, LAM, "exact"), lambda h: sr_ipo(h, DELTA, 1.0, LAM)),
}


@pytest.mark.parametrize("name", SAME)
def test_identities(name):
    """Up to rounding; λ = 0 leaves no trace in a single bit, in float32 either."""
    for a, b in zip(*map(value_and_slope, SAME[name])):
        assert torch.equal(a, b) if "λ = 0" in name else torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    a, b = (loss(H.float()) for loss in SAME[name])
    assert a.dtype == torch.float32 and torch.equal(a, b) or "λ = 0" not in name


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_the_naive_refinement_is_dpo_with_another_beta(lam):
    """Eq. 10, exact check 3: Δ = β h gives -log σ((1 - λ) β h), and DPO's slope at β(1 - λ) over 1 - λ."""
    value, found = value_and_slope(lambda h: sr_dpo(h, refinement(h, BETA), BETA, lam))
    expected, scaled = value_and_slope(lambda h: dpo(h, BETA * (1 - lam)))
    assert torch.allclose(value, expected, atol=1e-12)
    assert torch.allclose(found, scaled / (1 - lam), atol=1e-12)


SLOPES = {
    "Sr-DPO, exact check 6: -β σ(-(β h - λ Δ))": (
        lambda h: sr_dpo(h, DELTA, BETA, LAM), -BETA * torch.sigmoid(LAM * DELTA - BETA * H)),
    "SPCE, paper 2, eq. 9: β (p̂ - p)": (
        lambda h: spce(h, P, BETA), BETA * (losses.strength_hat(H, BETA) - P)),
    "naive, λ = 1: the logit is 0 whatever h is, so -β σ(0) never saturates": (
        lambda h: sr_dpo(h, refinement(h, BETA), BETA, 1.0), torch.full_like(H, -BETA / 2)),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes(name):
    loss, expected = SLOPES[name]
    assert torch.allclose(value_and_slope(loss)[1], expected, atol=1e-12)


@pytest.mark.parametrize("name, h", [
    ("ipo", torch.full_like(H, 0.5 / BETA)), ("sr-ipo", 0.5 / BETA + LAM * DELTA),        # exact check 7
    ("sr-ipo-exact", 0.5 / BETA + LAM * DELTA / BETA),
    ("spce", P.logit() / BETA), ("sr-spce", (P.logit() + LAM * DELTA) / BETA)])           # β h = logit p
def test_stationary_points(name, h):
    value, found = value_and_slope(lambda h: LOSSES[name](h, DELTA, P), h)
    assert found.abs().max() < 1e-12
    for side in (-0.1, 0.1):
        assert (LOSSES[name](h + side, DELTA, P) > value).all(), "no minimum"


def test_refinement_is_antisymmetric_and_telescopes():
    """Exact check 5: Δ(y⁻,y⁺) = -Δ(y⁺,y⁻), and, for any y*, Prop. 3.3(i): Δ(y⁻,y⁺) = Δ(y⁻,y*) - Δ(y⁺,y*)."""
    policy, reference = (torch.randn(3, 50, generator=RANDOM, dtype=torch.float64) for _ in range(2))

    def delta(worse, better):
        h_p = losses.margins((policy[better], policy[worse]), (reference[better], reference[worse]))
        return refinement(h_p, BETA)
    assert torch.equal(delta(0, 1), -delta(1, 0)) and delta(0, 1).abs().min() > 0
    assert torch.allclose(delta(0, 1), delta(0, 2) - delta(1, 2), atol=1e-12)


@every_loss
def test_every_loss(name):
    """One value per example, which depends on no other one: the caller may divide by any global count. Its
    slope is that of finite differences; Δ and p are constants, even where a caller did not detach them."""
    loss = LOSSES[name]
    alone = torch.cat([loss(*(x[i:i + 1] for x in (H, DELTA, P))) for i in range(200)])
    assert alone.shape == (200,) and torch.allclose(loss(H, DELTA, P), alone, rtol=1e-14)
    h, delta, p = (x[:20].clone().requires_grad_() for x in (H, DELTA, P))
    assert torch.autograd.gradcheck(lambda h: loss(h, DELTA[:20], P[:20]), h, atol=1e-7, rtol=1e-6)
    of_h, of_delta, of_p = slope(loss(h, delta, p), h, delta, p)
    assert of_h.abs().sum() > 0 and of_delta is None and of_p is None
    assert not refinement(h, BETA).requires_grad


@every_loss
def test_extremes_in_float32(name):
    """Margins of ±10⁴, where exp() of a float32 overflows: all stays finite, and the slopes are the limits.

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


# ------------------------------------------------------------------------------------------------------------
# Through a network: three queries with a chosen and a rejected response each, and p in tokens of its own

PROMPT_P = [60, 61, 62]
PAIRS = [([1, 5, 6, 7], [8, 9, 2], [8, 10, 11, 2]), ([1, 12], [13, 14, 15, 16, 2], [17, 2]),
         ([1, 5, 6], [20, 2], [21, 22])]


class Nets:
    def __init__(self, family):
        self.policy, self.reference = (tiny.net(family, seed=seed) for seed in (1, 2))

    def margin(self, p=()):
        """h of each pair, after p⊕x, as training computes it: one forest, both networks on the same batch."""
        queries = [[*x[:1], *p, *x[1:]] for x, *_ in PAIRS]
        forest = data.pack([query + y for query, pair in zip(queries, PAIRS) for y in pair[1:]])
        starts = [len(query) for query in queries for _ in range(2)]
        with torch.no_grad():
            frozen = losses.logprobs(self.reference, forest, starts).view(-1, 2)
        current = losses.logprobs(self.policy, forest, starts).view(-1, 2)
        return losses.margins(current.unbind(1), frozen.unbind(1))

    def delta(self):
        return refinement(self.margin(PROMPT_P), BETA)

    def slopes(self, loss):
        """{name: gradient} of a loss of h."""
        names, weights = zip(*self.policy.named_parameters())
        return dict(zip(names, torch.autograd.grad(loss(self.margin()).sum(), weights)))


@pytest.fixture(params=["llama", "neox"])
def nets(request):
    return Nets(request.param)


REFINED = {"sr_dpo": (sr_dpo, dpo, LN2),
           "sr_ipo": (sr_ipo, ipo, 1 / (4 * BETA ** 2))}
every_refined = pytest.mark.parametrize("name", REFINED)


@every_refined
def test_at_the_reference_refinement_changes_nothing(nets, name):
    """Paper 1, exact check 1: at π = π_ref both margins are exactly 0, the loss is ln 2 or 1/(4β²), and the
    gradient is the base's."""
    refined, base, start = REFINED[name]
    nets.reference = copy.deepcopy(nets.policy)
    h, delta = nets.margin(), nets.delta()
    assert (h == 0).all() and (delta == 0).all()
    loss, plain = refined(h, delta, BETA, LAM), base(h, BETA)
    assert torch.allclose(loss, torch.full_like(h, start), atol=1e-12) and torch.equal(loss, plain)
    gradients = nets.slopes(lambda h: refined(h, delta, BETA, LAM))
    tiny.assert_close(gradients, nets.slopes(lambda h: base(h, BETA)), 0)
    assert gradients["embed.weight"].abs().max() > 1e-3


@every_refined
def test_no_gradient_through_the_augmented_pass(nets, name):
    """Paper 1, exact check 4. The tokens of p stand nowhere else: their embeddings learn only through p⊕x."""
    refined, delta = REFINED[name][0], nets.delta()
    found = nets.slopes(lambda h: refined(h, nets.delta(), BETA, LAM))
    assert (found["embed.weight"][PROMPT_P] == 0).all()
    number = t(*delta.tolist())                                    # a constant beyond doubt
    tiny.assert_close(found, nets.slopes(lambda h: refined(h, number, BETA, LAM)), 0)
    leaking = nets.slopes(lambda h: dpo(nets.margin(PROMPT_P), BETA))       # the control: p does matter
    assert leaking["embed.weight"][PROMPT_P].abs().max() > 1e-3


@every_refined
def test_weights_move_as_finite_differences_say(nets, name):
    """The slope along a random direction of all weights, with Δ held at its value; letting Δ move is another
    slope."""
    refined, weights = REFINED[name][0], dict(nets.policy.named_parameters())
    generator = torch.Generator().manual_seed(4)
    direction = {name: torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                 for name, weight in weights.items()}

    @torch.no_grad()
    def total(step, held=None):
        for name, weight in weights.items():
            weight += step * direction[name]
        delta = nets.delta() if held is None else held
        loss = refined(nets.margin(), delta, BETA, LAM).sum().item()
        for name, weight in weights.items():
            weight -= step * direction[name]
        return loss

    held, epsilon = nets.delta(), 1e-6
    gradients = nets.slopes(lambda h: refined(h, held, BETA, LAM))
    expected = sum((gradients[name] * direction[name]).sum() for name in weights).item()
    found = (total(epsilon, held) - total(-epsilon, held)) / (2 * epsilon)
    moving = (total(epsilon) - total(-epsilon)) / (2 * epsilon)
    assert abs(found - expected) < 1e-5 * abs(expected) and abs(moving - expected) > 1e-2 * abs(expected)


# ------------------------------------------------------------------------------------------------------------
# Log-probabilities of tokens; those of sequences in a forest are in test_forest.py

def head_and_hidden(M=10):
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(6, 9, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(9, 6, generator=generator))
    hidden = torch.randn(M, 6, generator=generator).double().requires_grad_()
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
    """Values and gradients in chunks of 3 are those of a log-softmax, and of finite differences; 3 rows of
    logits exist at a time."""
    head, hidden, tokens = head_and_hidden(M)
    expected = head(hidden).log_softmax(-1)[range(M), tokens]
    weights = torch.arange(1.0, M + 1, dtype=torch.float64)
    slopes = slope(expected * weights, hidden, head.weight)
    monkeypatch.setattr(losses, "HEAD_CHUNK", 3)
    rows = []
    hook = head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    found = losses.token_logprobs(head, hidden, tokens)
    for a, b in zip((expected, *slopes), (found, *slope(found * weights, hidden, head.weight)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    again = M - ((M - 1) % 3 + 1)                        # all but the last chunk, for the gradient
    assert max(rows) <= 3 and sum(rows) == M + again
    hook.remove()
    with torch.no_grad():
        assert torch.equal(losses.token_logprobs(head, hidden, tokens), found)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: losses.token_logprobs(lambda x: x @ weight.T, hidden, tokens),
        (hidden, head.weight), atol=1e-7)


def test_nothing_supervised_is_zero_with_a_graph():
    """A batch without a supervised token has a backward pass, as FSDP needs: with gradients of zero."""
    head, hidden, tokens = head_and_hidden(0)
    found = losses.token_logprobs(head, hidden, tokens)
    assert found.shape == (0,)
    assert all(g is not None and (g == 0).all() for g in slope(found, hidden, head.weight))
    net, forest = tiny.net(), data.pack([[1, 5, 6], [1, 5, 7]])
    found = losses.logprobs(net, forest, [3, 3])
    assert found.tolist() == [0, 0]
    assert all((g == 0).all() for g in slope(dpo(found, BETA), *net.parameters()))
    some = losses.logprobs(net, forest, [3, 2])
    assert some[0] == 0 and some[1] < -0.01


def test_low_precision_logits_are_normalised_in_float32():
    """2,048 equal logits in bfloat16: log 1/2048 = -7.6246; a sum in bfloat16 is off by more than 0.01."""
    head = torch.nn.Linear(4, 2048, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        head.weight.fill_(0.5)
    found = losses.token_logprobs(head, torch.ones(3, 4, dtype=torch.bfloat16), torch.tensor([0, 5, 2047]))
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.full((3,), -math.log(2048)), atol=1e-5)


def test_extreme_logits():
    """Logits of ±1e4 in float32: log-probability 0 of the likely token, -2e4 of others; finite gradients."""
    head = torch.nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [-1e4], [-1e4]]))
    hidden = torch.ones(2, 1, requires_grad=True)
    found = losses.token_logprobs(head, hidden, torch.tensor([0, 1]))
    assert found.tolist() == [0, -2e4]
    assert all(g.isfinite().all() for g in slope(found, hidden, head.weight))
