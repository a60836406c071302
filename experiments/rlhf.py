"""RLHF, the baseline of paper 2: a reward model from preference pairs, and PPO against it.

    torchrun rlhf.py                                         on the embedded world: base, SFT, reward model, PPO
    torchrun rlhf.py --recipe=reward --model=SFT --data=PAIRS --eval_data=HELD_OUT --out_dir=out/reward
    torchrun rlhf.py --recipe=rlhf --model=SFT --reward=out/reward/final --prompts=FILE --out_dir=out/rlhf

The reward model is the same transformer under a head of one number, read at the last token of x⊕y; its folder is what
transformers calls sequence classification. PPO trains two networks: the policy, from the SFT model, and the value network,
from the reward model. Settings, ranks, data, sampling, checkpoints and the loop are train.py's; here is what differs.

Sources: [BT] the Bradley–Terry loss, as in Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; [PPO] Schulman et al. 2017
(1707.06347), eq. 7 and 9; [GAE] Schulman et al. 2015 (1506.02438), eq. 16; [N+] the details listed by Huang et al. 2024
(2403.17031). Left out: adapters, an entropy bonus, an adaptive κ. There are no minibatches either: a smaller --batch_size
makes as many updates, and on fresher samples.

Letters: S sequences, T tokens of a response, M tokens of all responses, one behind the other.
"""
import dataclasses
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import losses
import model
import sample
import train
from support.cli import InputError

# ---------------------------------------------------------------------------------------------------------------------
# Formulas: pure functions of tensors


def reward_loss(chosen, rejected):
    """-log σ(r(x, y⁺) - r(x, y⁻)) [BT]: two tensors (N,) of rewards -> (N,).

    r⁺ = 1.5, r⁻ = ½: log(1 + e⁻¹) = 0.3133. Equal rewards: ln 2.
    """
    return -F.logsigmoid(chosen - rejected)


def token_rewards(logprobs, reference, score, kl_coef):
    """The reward of each token of one response [N+]: -κ (log π_old(y_t) - log π_ref(y_t)), and r(x, y) more at the last.

    logprobs, reference: (T,) in nats; score: a number. -> (T,), with the sum r - κ (log π_old(y|x) - log π_ref(y|x)).
    κ = ½, log-ratios 2 and -1, r = 3: (-1, ½ + 3).
    """
    rewards = -kl_coef * (logprobs - reference)
    rewards[-1] += score
    return rewards


def gae(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t, and V = 0 behind the last token [GAE, eq. 16]: (T,) -> (T,).

    values: V_t, of what stands before token t. The return is A_t + V_t.
    γ = 1, λ = ½, r = (0, 1), V = (½, ¼): δ = (-¼, ¾), A = (-¼ + ½·¾, ¾) = (⅛, ¾).
    """
    following = torch.cat((values[1:], values.new_zeros(1)))
    advantages, ahead = [], 0.0
    for delta in reversed((rewards + gamma * following - values).tolist()):
        ahead = delta + gamma * lam * ahead
        advantages.append(ahead)
    return torch.tensor(advantages[::-1], dtype=values.dtype)


def moments(values, total=list):
    """(mean, variance) of values (M,) of all ranks; total([numbers]) adds numbers up over the ranks."""
    count, first = total([len(values), float(values.sum())])
    mean = first / count
    second, = total([float((values - mean).square().sum())])
    return mean, second / count


def whiten(advantages, total=list):
    """(A - mean) / deviation over the batch's response tokens [N+]: (M,) -> (M,). Equal ones all become 0.

    (1, 3) -> (-1, 1).
    """
    mean, variance = moments(advantages, total)
    return (advantages - mean) / math.sqrt(variance + 1e-12)


def policy_loss(logprobs, old, advantages, clip):
    """-min(ρ A, clip(ρ, 1 ± ε) A) with ρ = π(y_t) / π_old(y_t) [PPO, eq. 7]: log-probabilities (M,), A (M,) -> (M,).

    ρ = 3/2, ε = 0.2: A = 1 gives -1.2, without a gradient: this token has moved far enough. A = -1 gives 3/2.
    """
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values, old, returns, clip):
    """½ max((V - R)², (clip(V, V_old ± ε) - R)²) [N+]: (M,) each -> (M,).

    V_old = 0, R = 1, ε = 0.2: V = ½ gives ½ max(¼, 0.64) = 0.32, without a gradient. V = -½ gives ½ · 2.25 = 1.125.
    """
    clipped = torch.clamp(values, old - clip, old + clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


# ---------------------------------------------------------------------------------------------------------------------
# One number instead of logits

def read_head(net, hidden):
    """The head's number at hidden states (n, D): (n,), in float32 at least, for small differences count."""
    return net.head(hidden if hidden.dtype == torch.float64 else hidden.float())[:, 0]


def scores(net, forest):
    """r(x, y), unshifted, of each sequence of a data.Forest, read at its last token: (S,)."""
    last = torch.stack([path[-1] for path in forest.paths])
    return read_head(net, net.read(forest)[last.to(net.embed.weight.device)])


def values_by_token(net, forest, starts):
    """V_t of each response token, read where losses.logprobs_by_token reads the policy: at the token before it. (M,)"""
    before = torch.cat([path[start - 1:-1] for path, start in zip(forest.paths, starts)])
    return read_head(net, net.read(forest)[before.to(net.embed.weight.device)])


def reward_shift(config, where):
    """What the folder `where` asks to take from its scores; 0 for a reward model of somebody else."""
    shift = config.source.get("reward_shift", 0.0)
    if not isinstance(shift, (int, float)) or not math.isfinite(shift):
        raise InputError(f"{where}/config.json: reward_shift must be a number, not {shift!r:.60}.")
    return shift


def padding_id(tokenizer, chat, config):
    """An id that never ends a response, or None: transformers takes the last token that is another one for the end."""
    may_end = tokenizer.sampling_mask(config.vocab_size)
    may_end[data.end_id(tokenizer, chat)] = True
    free = [id for id in range(config.vocab_size) if not may_end[id]]
    return max(free, key=lambda id: (id != tokenizer.unk_id, id), default=None)       # a row without a piece before <unk>


# ---------------------------------------------------------------------------------------------------------------------
# Settings

class Recipe(train.Recipe):
    @property
    def has_reference(self):
        return self.loss == "ppo"

    def __post_init__(self):
        """These two are no combinations of train.py's axes, so there is nothing to refuse."""


# Paper 2 gives κ = 0.05 for its RLHF baseline; learning rates and batches are ours.
RECIPES = {
    #                loss      responses  pairs      labels
    "reward": Recipe("reward", "dataset", "dataset", "hard", dict(optimizer="adam", lr=1e-5, batch_size=64, warmup_steps=10,
                                                                  grad_clip=1.0)),
    "rlhf":   Recipe("ppo",    "policy",  None,      None,   dict(optimizer="adam", lr=2e-6, batch_size=64, warmup_steps=10,
                                                                  grad_clip=1.0)),
}


@dataclass
class Settings(train.Settings):
    """Train a reward model (--recipe=reward) or a policy against one (--recipe=rlhf); without --model on the toy world."""
    recipe: str = "rlhf"                     # reward, rlhf
    reward: str | None = None                # folder of the reward model, for rlhf
    k: int = 1                               # responses a prompt
    temperature: float = 1.0                 # of sampling: another one would not sample from the π_old that the ratio is of
    top_p: float = 1.0                       # of sampling, see temperature
    kl_coef: float = 0.05                    # κ, the price of a nat between policy and reference (paper 2)
    ppo_epochs: int = 4                      # updates on each rollout
    clip_range: float = 0.2                  # ε of the ratio
    value_clip_range: float = 0.2            # ε of the value
    value_coef: float = 0.1                  # weight of the value loss
    gamma: float = 1.0                       # discount a token
    gae_lambda: float = 0.95                 # λ of the advantage: 0 trusts the value network, 1 the sampled returns
    eos_penalty: float = 1.0                 # taken from the reward of a response that does not end
    shift_samples: int = 256                 # recipe reward: responses of the SFT model whose mean reward becomes 0

    recipes = RECIPES

    def __post_init__(self):
        super().__post_init__()
        for name in ("ppo_epochs", "shift_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}={getattr(self, name)}: must be at least 1.")
        for name in ("clip_range", "value_clip_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name}={getattr(self, name)}: must be larger than 0.")
        for name in ("kl_coef", "value_coef", "eos_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name}={getattr(self, name)}: must be at least 0.")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name}={getattr(self, name)}: must be in [0, 1].")
        if self.lora_rank:
            raise InputError(f"--lora_rank={self.lora_rank}: rlhf.py trains all weights; adapters are for train.py.")
        if self.dry_run:
            raise InputError("--dry_run counts the memory of train.py's recipes; it knows nothing of reward models and PPO.")

    def folders(self):
        return list(dict.fromkeys([*super().folders(), *filter(None, [self.reward])]))

    def users(self):
        rlhf = self.recipe == "rlhf"
        return [*(entry for entry in super().users() if entry[0] != "sample_every"),           # here it needs no judge
                ("sample_every", rlhf, "--recipe=rlhf"),
                ("beta lam refinement_prompt delta_scale judge judge_task reference_cache", False, "train.py"),
                ("reward kl_coef ppo_epochs clip_range value_clip_range value_coef gamma gae_lambda eos_penalty", rlhf,
                 "--recipe=rlhf"),
                ("shift_samples", not rlhf, "--recipe=reward")]


# ---------------------------------------------------------------------------------------------------------------------
# The reward model

METRICS = [*train.METRICS, "reward", "policy_loss", "value_loss", "clip_share", "explained_variance", "reward_seconds"]


class RewardTrainer(train.Trainer):
    """Preference pairs -> a reward model that starts from the SFT model's body and a head of zeros."""

    def __init__(self, settings):
        if model.read_config(settings.model).scores:
            raise InputError(f"--model={settings.model} is a reward model; name the SFT model to start from.")
        super().__init__(settings)

    def load(self, folder, dtype, trained=False):
        return super().load(folder, dtype, trained, scores=trained)       # only the SFT model is not trained

    def objective(self, pairs, log):
        """The summed loss of some pairs, y⁺ and y⁻ behind the same x."""
        forest, _ = train.pack_pairs(pairs, "x")
        chosen, rejected = scores(self.policy, forest).view(-1, 2).unbind(1)
        values = reward_loss(chosen, rejected)
        for name, value in (("loss", values), ("margin", chosen - rejected), ("accuracy", losses.correct(chosen - rejected))):
            log.add(name, value)
        log.count("tokens", sum(2 * len(pair.x) + len(pair.chosen) + len(pair.rejected) for pair in pairs))
        return values.sum()

    def save_final(self):
        """final/, with the shift and a padding id in its config.json."""
        config = self.policy.config
        extra = {"reward_shift": self.shift(), "pad_token_id": padding_id(self.tokenizer, self.data.limits["chat"], config)}
        self.policy.config = dataclasses.replace(config, source=config.source | extra)
        super().save_final()

    @torch.no_grad()
    def shift(self):
        """The mean score of the SFT model's own responses to the first prompts of the data: less that, they have mean 0."""
        self.asked = train.Asked()            # the last checkpoint holds all but this, so nothing here is given up halfway
        sft = self.load_frozen(self.settings.model)
        self.stop_ids, self.allowed = sample.stopping(self.tokenizer, self.data.limits["chat"], sft.config)
        share = self.data.positions(0, min(self.settings.shift_samples, len(self.data)))[self.ranks.rank::self.ranks.size]
        with train.gathered(self.policy, sft):
            samples = self.respond(sft, self.steps, share)                # the uniforms of the step behind the last
            rows = [row.x + one.ids for (_, row), group in zip(share, samples) for one in group]
            size = self.settings.micro_batch_size
            found = [scores(self.policy, data.pack(rows[i:i + size])) for i in range(0, len(rows), size)]
        total, count = self.ranks.sum([sum(float(part.double().sum()) for part in found), len(rows)])
        self.say(f"mean reward of {count:.0f} responses of {self.settings.model}: {total / count:.4f}, from now on 0")
        return total / count


# ---------------------------------------------------------------------------------------------------------------------
# PPO

@dataclass
class Response:
    """One response y to x and what is known of it before the update; tensors (T,) in float64 on the CPU."""
    x: list
    ids: list
    finished: bool
    score: float = 0.0                       # the reward model's, shifted
    old: torch.Tensor | None = None          # log π_old of its tokens
    reference: torch.Tensor | None = None    # log π_ref
    values: torch.Tensor | None = None       # V_old
    advantages: torch.Tensor | None = None   # whitened
    returns: torch.Tensor | None = None

    @property
    def kl(self):
        """log π_old(y|x) - log π_ref(y|x), in nats."""
        return float((self.old - self.reference).sum())


def tokens_of(responses, name):
    """The tensors (T,) of that name of all responses, one behind the other: (M,)."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(getattr(one, name) for one in responses)])


class PPOTrainer(train.Trainer):
    """A policy, its frozen reference and reward model, and a value network that starts from the reward model.

    An example of the loop is a prompt's group of K responses, which share x in the forest.
    """
    epoch = 0                                # of the updates on one rollout
    value = None                             # the value network, which comes last

    def __init__(self, settings):
        s = settings
        if not s.reward:
            raise InputError("--reward: name the folder of the reward model, as --recipe=reward writes it.")
        if not model.read_config(s.reward).scores:
            raise InputError(f"--reward={s.reward} is no sequence-classification model; --recipe=reward makes one.")
        if model.read_config(s.model).scores:
            raise InputError(f"--model={s.model} is a reward model; name the SFT model to start from.")
        super().__init__(s)
        self.reward = self.load_frozen(s.reward)
        self.shift = reward_shift(self.reward.config, s.reward)
        self.value = self.load(s.reward, self.masters, trained=True)
        self.value.compute_dtype = self.dtype
        self.optimizer = self.make_optimizer()           # of both networks

    def load(self, folder, dtype, trained=False):
        return super().load(folder, dtype, trained, scores=folder == self.settings.reward)

    def networks(self):
        return {"policy": self.policy} | ({"value": self.value} if self.value is not None else {})

    def new_log(self):
        return train.Log(self.ranks, METRICS)

    # -- the rollout ---------------------------------------------------------------------------------------------------

    def rollout(self, step, share, log):
        """K responses to each of this rank's prompts, with all that the updates take as constant: a list of groups."""
        with train.gathered(self.policy, self.reference, self.reward, self.value):
            started = time.perf_counter()
            samples = self.respond(self.policy, step, share)
            log.value("sample_seconds", time.perf_counter() - started)
            self.go_on()
            started = time.perf_counter()
            groups = self.read(share, samples)
            log.value("reward_seconds", time.perf_counter() - started)
        responses = [one for group in groups for one in group]
        self.estimate(responses, log)
        self.describe(responses, log)
        log.add("prompt_cut", torch.tensor([float(query.cut) for _, query in share]))
        self.write_rollouts(step, [{"prompt": row.row.prompt, "response": sample.response_text(self.tokenizer, one),
                                    "reward": round(one.score, 6), "kl": round(one.kl, 6), "finished": [one.finished, True]}
                                   for (_, row), group in zip(share, groups) for one in group])
        s = self.settings
        if s.sample_every and step % s.sample_every == 0 and share:
            self.say(f"\nstep {step + 1}: {data.context_text(share[0][1].row.prompt)!r}")
            for one in groups[0]:
                self.say(f"  reward {one.score:7.3f}  {sample.response_text(self.tokenizer, one)!r}")
        return groups

    def micro_batches(self, groups):
        size = self.settings.micro_batch_size
        return [groups[i:i + size] for i in range(0, len(groups), size)]

    @torch.no_grad()
    def read(self, share, samples):
        """The samples as Responses with their log-probabilities, values and scores. The micro-batches are those of the
        updates: the first ratio is then exactly 1."""
        groups = [[Response(row.x, one.ids, one.finished) for one in group] for (_, row), group in zip(share, samples)]
        for micro in self.micro_batches(groups):
            responses = [one for group in micro for one in group]
            forest, starts = self.pack(responses)
            lengths = [len(one.ids) for one in responses]
            found = {"old": losses.logprobs_by_token(self.policy, forest, starts),
                     "reference": losses.logprobs_by_token(self.reference, forest, starts),
                     "values": values_by_token(self.value, forest, starts)}
            for name, values in found.items():
                for one, part in zip(responses, values.cpu().double().split(lengths)):
                    setattr(one, name, part)
            for one, score in zip(responses, scores(self.reward, forest).tolist()):
                one.score = score - self.shift
        return groups

    def pack(self, responses):
        return data.pack([one.x + one.ids for one in responses]), [len(one.x) for one in responses]

    def estimate(self, responses, log):
        """Give the responses their returns and their advantages, whitened over all ranks."""
        s = self.settings
        for one in responses:
            score = one.score - (0.0 if one.finished else s.eos_penalty)
            one.advantages = gae(token_rewards(one.old, one.reference, score, s.kl_coef), one.values, s.gamma, s.gae_lambda)
            one.returns = one.advantages + one.values
        white = whiten(tokens_of(responses, "advantages"), self.ranks.sum)
        for one, part in zip(responses, white.split([len(one.ids) for one in responses])):
            one.advantages = part
        returns, values = tokens_of(responses, "returns"), tokens_of(responses, "values")
        (_, missed), (_, variance) = moments(returns - values, self.ranks.sum), moments(returns, self.ranks.sum)
        log.value("explained_variance", 1 - missed / max(variance, 1e-12))

    def describe(self, responses, log):
        """Metrics of responses, each the mean over them; `reward` is the shifted score, without κ and the penalty."""
        for name, values in (("reward", [one.score for one in responses]), ("kl", [one.kl for one in responses]),
                             ("response_length", [len(one.ids) for one in responses]),
                             ("finished", [one.finished for one in responses])):
            log.add(name, torch.tensor(values, dtype=torch.float64))

    # -- the updates ---------------------------------------------------------------------------------------------------

    def learn(self, step, groups, log):
        """ppo_epochs optimizer steps on the whole rollout; returns the mean norm of their gradients."""
        norms, self.failed = [], False
        for self.epoch in range(self.settings.ppo_epochs):
            norms.append(super().learn(step, groups, log))
            if self.failed:                               # the others would fail too
                break
        self.epoch = 0
        return sum(norms) / len(norms)

    def skip(self, step, why):
        """A step counts as skipped when its first update is; behind that one only the rest of its updates is left out."""
        self.failed = True
        if self.epoch == 0:
            super().skip(step, why)
        else:
            self.say(f"\nstep {step + 1}, update {self.epoch + 1}: {why}; the rest of the step is left out")

    def go_on(self):
        """Behind its first update a step can no longer be dropped as if it had not been."""
        if self.epoch == 0:
            super().go_on()

    def weight(self, group):
        return sum(len(one.ids) for one in group)

    def objective(self, groups, log):
        """The summed loss of the groups' tokens: the policy's, and value_coef times the value network's."""
        s, responses = self.settings, [one for group in groups for one in group]
        forest, starts = self.pack(responses)
        logprobs = losses.logprobs_by_token(self.policy, forest, starts)
        values = values_by_token(self.value, forest, starts)
        old, advantages = (tokens_of(responses, name).to(logprobs) for name in ("old", "advantages"))
        old_values, returns = (tokens_of(responses, name).to(values) for name in ("values", "returns"))
        of_policy = policy_loss(logprobs, old, advantages, s.clip_range)
        of_value = value_loss(values, old_values, returns, s.value_clip_range)
        both = of_policy + s.value_coef * of_value
        clipped = ((logprobs - old).exp() - 1).abs() > s.clip_range
        for name, value in (("loss", both), ("policy_loss", of_policy), ("value_loss", of_value), ("clip_share", clipped)):
            log.add(name, value)
        log.count("tokens", sum(len(one.x) + len(one.ids) for one in responses))
        return both.sum()

    def nothing(self):
        zero = torch.zeros(1, dtype=torch.float64)
        example = Response([0], [0], True, 0.0, zero, zero, zero, zero, zero)
        return self.objective([[example]], self.new_log()) * 0

    @torch.no_grad()
    def evaluate(self):
        """eval_reward, eval_kl, … of fresh responses to held-out prompts, from the same uniforms each time."""
        if not self.data.held_out:
            return {}
        share = list(enumerate(self.data.held_out))[self.ranks.rank::self.ranks.size]
        log = self.new_log()
        with train.gathered(self.policy, self.reference, self.reward, self.value):
            groups = self.read(share, self.respond(self.policy, 10 ** 6, share))         # far from the streams of the steps
        self.describe([one for group in groups for one in group], log)
        return {f"eval_{name}": value for name, value in log.means().items()}


TRAINERS = {"reward": RewardTrainer, "rlhf": PPOTrainer}


def main(settings):
    """Train what was named, or run the toy world's path to it where no model was."""
    return train.main(settings, TRAINERS[settings.recipe])


if __name__ == "__main__":
    train.launch(main, Settings)
