"""From a trained convolutional network to its uncertainty, six ways side by side.

A small network is trained on digits of 8 x 8 pixels. Then its last layer alone is inferred (the
rest are constants, whose features are computed once), or all of it. The methods are compared on
test digits, and on inverted ones, of which a network that knows its limits should be less sure.

    python examples/trained_network.py
"""

import time

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import bnnflow as bf

EPOCHS, BATCH, MEMBERS, FLOW_STEPS = 30, 64, 5, 400

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1000], order[1000:]
strange = -images[test]  # white on black becomes black on white


def made() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def trained(net: nn.Module) -> nn.Module:
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in train[torch.randperm(len(train))].split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimiser.step()
    return net


def posterior(net: nn.Module) -> bf.BayesianModel:
    return bf.BayesianModel(
        net,
        bf.priors.Normal(1.0),
        bf.likelihoods.Categorical(),
        images[train],
        labels[train],
    )


def show(name: str, model: bf.BayesianModel, draws: bf.Draws, seconds: float) -> None:
    known, unknown = (
        bf.predict(model, draws, images[test]),
        bf.predict(model, draws, strange),
    )
    doubt = torch.cat([torch.special.entr(p.probs).sum(-1) for p in (known, unknown)])
    auroc = roc_auc_score([0] * len(test) + [1] * len(test), doubt)
    y = labels[test]
    scores = (
        bf.metrics.accuracy(known, y),
        bf.metrics.lppd(known, y),
        bf.metrics.ece(known, y),
        auroc,
    )
    print(f"{name:22}" + "".join(f"{score:10.3f}" for score in scores) + f"{seconds:10.1f}")


start = time.perf_counter()
net = trained(made())
spent = time.perf_counter() - start
whole = posterior(net)
net[:-1].requires_grad_(False)  # constants from here on: theta holds the last layer
head = posterior(net)
print(f"{whole.dim} weights, {head.dim} of them in the last layer\n")
print(
    f"{'':22}"
    + "".join(f"{name:>10}" for name in ("accuracy", "lppd", "ECE", "AUROC", "seconds"))
)

show("the network", head, bf.sample(head, bf.DeepEnsemble(members=1), init=[net]), spent)
laplace = bf.sample(head, bf.Laplace(), init=net, draws=200, seed=0)
show("Laplace, last layer", head, laplace, laplace.info["seconds"])
hmc = bf.sample(head, bf.HMC(), init=net, chains=8, warmup=100, draws=100, seed=0)
show("HMC, last layer", head, hmc, hmc.info["seconds"])
swag = bf.sample(whole, bf.SWAG(), init=net, draws=100, seed=0)
show("SWAG", whole, swag, swag.info["seconds"])
start = time.perf_counter()
members = [net, *(trained(made()) for _ in range(MEMBERS - 1))]
ensemble = bf.sample(whole, bf.DeepEnsemble(), init=members)
show(f"ensemble of {MEMBERS}", whole, ensemble, spent + time.perf_counter() - start)
flow = bf.fit_flow(
    head, hmc, velocity="weights", training=bf.Training(steps=FLOW_STEPS), seed=0
)
refined = bf.refine(head, bf.sample(head, flow, draws=200, seed=1), seed=2)
show("flow, last layer", head, refined, flow.info["seconds"] + refined.info["seconds"])

value, error = bf.evidence(head, refined, bf.SMC(particles=100, ess=0.8, moves=4), seed=3)
print(
    f"\nlog evidence of the last layer, from the flow's draws: {value:.1f} +- {error:.1f}"
)
