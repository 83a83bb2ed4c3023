"""Settings that are wrong, or that do not go together, are refused in one line that names the fix."""

import pytest

from tests.conftest import refusal_of

SIZES = "cnn, custom, linear, pretrained, vit_b_16, vit_s_16, vit_ti_16, vit_tiny"
LORA = "strategy=fedlora lora=default"
FEDSA = f"{LORA} strategy.aggregation=fedsa evaluate.objective=personal_accuracy"
HETLORA = f"{LORA} strategy.aggregation=hetlora"
ROBUST = f"{LORA} evaluate.objective=personal_accuracy strategy.robust=median"
NO_B = "is of the global model, which lacks every client's B with strategy.aggregation=fedsa: set evaluate.objective=p"
NOT_AVERAGED = ("fedsa", "flora", "fedex", "flexlora", "hetlora")
NOT_ROBUST = "is not: use fedit, ffa, rolora or fedavg"
MORE = "does more than average: use fedit, ffa, rolora"
NO_RULE = "which strategy.aggregation=flexlora does not do: set strategy.aggregation=hetlora or lora.prune_gamma=null"
SWEEP = "is several values: add -m for a sweep, a run with each of them (python -m tools.run -m"
RAISE = "raise clients or strategy.fraction_train"

GENERAL = [
    ("lr=0.1", "lr is not a setting: did you mean train.lr?"),
    ("num_round=3", "num_round is not a setting: did you mean num_rounds?"),
    ("+extra=1", "extra is not a setting"),
    ("model=vit_huge", f"model=vit_huge is not known: choose one of {SIZES}"),
    ("dataset=custom", "dataset.name must be given: add dataset.name=VALUE"),
    ("num_rounds=0", "num_rounds=0 is out of range: it must be at least 1"),
    ("train.lr=0", "train.lr=0 is out of range: it must be more than 0"),
    ("train.lr=inf", "train.lr=inf must be a finite number"),
    ("strategy.norm_limit=1", "strategy.norm_limit=1 is out of range: it must be more than 1"),
    ("strategy.fraction_train=1.5", "strategy.fraction_train=1.5 is out of range: it must be at most 1"),
    ("seed=1.5", "seed=1.5 must be a whole number, got float"),
    ("evaluate.central=yes", "evaluate.central=yes must be true or false, got str"),
    ("evaluate.central=1", "evaluate.central=1 must be true or false, got int"),
    ("train.optimizer=adam", "train.optimizer=adam is not known: choose one of adamw, sgd"),
    ("train=3", "train must be a group of settings, got 3"),
    ("a b", "settings are written key=value"),
    ("dataset=regression", "model=vit_tiny needs images with classes, dataset=regression has no images: set"),
    ("dataset=regression model=linear", "partition=dirichlet needs classes, dataset=regression has none"),
    ("partition.alpha=null", "partition=dirichlet needs partition.alpha"),
    ("evaluate.personal_epochs=0 evaluate.objective=personal_accuracy", "needs fine-tuning"),
    ("experiment=toy_regression stopping.metric=accuracy", "needs classes, dataset=regression has none: set st"),
    ("experiment=toy_regression model.image_size=8", "=8 resizes images, dataset=regression has none: set it to null"),
    ("stopping.metric=loss", "=3 evaluations without progress, at evaluate.every=5, do not fit into num_rounds="),
    ("num_rounds=5 evaluate.select=best", "select=best has only the last round to choose from: lower evaluate"),
    ("stopping.patience=0", "stopping.patience=0 is out of range: it must be at least 1"),
    ("dataset.normalization=imagenet", "needs images of 3 channels, got shape [32, 32, 1]"),
    ("train.momentum=0.9", "has no meaning for adamw"),
    ("strategy.min_replies=11", "strategy.min_replies=11 can never be met with 10 clients in a round"),
    ("strategy.min_clients=11", "strategy.min_clients=11 is more than clients=10"),
    ("deployment.client_keys=/keys", "simulated nodes have none: leave it out, or set deployment=local"),
    ("deployment=local deployment.client_keys=keys", "client_keys=keys is relative"),
    ("home=some/where", "home=some/where is relative, and the apps run in another folder"),
    ("split=auto", "split_config=2-10 does not go with model=vit_tiny: split points 2 and 10 of a model of 3"),
    ("split=auto split.split_config=1:2", "split_config=1:2 does not go with model=vit_tiny: split points"),
    ("split=auto model=cnn", "splits ViTs only, got model=cnn: set split=none"),
    ("split.auto_save_split_models=true", "needs a folder: set split.model_storage_dir"),
    ("split.model_storage_dir=here", "split.model_storage_dir=here is relative"),
    ("seed=0,1", f"seed=0,1 {SWEEP} seed=0,1)"),
    ("model=linear,cnn", f"model=linear,cnn {SWEEP} model=linear,cnn)"),
    ("seed=range(3)", f"seed=range(3) {SWEEP} 'seed=range(3)')"),
    ("lora.targets=qkv,proj", "-m lora.targets=qkv,proj), or write a list as lora.targets=[qkv,proj]"),
]
ADAPTERS = [
    ("strategy=fedlora", "FedLoRA needs a model with adapters: set lora=default (got lora=none)"),
    ("lora=default", "lora=default trains adapters, strategy=fedavg sends whole models"),
    (f"{LORA} lora.rank=0", "lora.rank=0 is out of range: it must be at least 1"),
    (f"{LORA} lora.targets=[]", "lora.targets is empty"),
    (f"{LORA} lora.rank_by_client=[4,8]", "strategy.aggregation=fedit cannot aggregate"),
    (f"{LORA} strategy.aggregation=flora lora.rank_by_client=[4,16]", "has a rank above lora.rank=8"),
    ("strategy.aggregation=fedit", "strategy.aggregation=fedit is for adapters, strategy=fedavg has none"),
    (f"{FEDSA} checkpoint=off", "keeps each client's B in its chunk store: set checkpoint=recent"),
    (f"{LORA} strategy.aggregation=fedsa evaluate.objective=accuracy", f"objective=accuracy {NO_B}"),
    (f"{FEDSA} stopping.metric=loss", "lacks every client's B"),
    ("strategy.server_lr=0.1", "has no effect without strategy.server_optimizer"),
    (f"{FEDSA} lora.adapter=/adapter", "lora.adapter gives all clients one B"),
    (f"{LORA} strategy.aggregation=flora strategy.server_optimizer=fedadam", "aggregation=flora: use"),
    (f"{LORA} strategy.aggregation=flexlora lora.prune_gamma=0.5", f"lets clients prune their ranks, {NO_RULE}"),
    (f"{HETLORA} lora.prune_penalty=1", "lora.prune_penalty=1.0 has no effect without lora.prune_gamma: set one"),
    (f"{HETLORA} lora.rank_min=2", "lora.rank_min=2 has no effect without lora.prune_gamma: set one"),
    (f"{HETLORA} lora.prune_gamma=1", "lora.prune_gamma=1 is out of range"),
    (
        f"{HETLORA} lora.prune_gamma=0.5 lora.rank_by_client=[2,4] lora.rank_min=3",
        "that a client starts with, 2: lower",
    ),
    (f"{HETLORA} lora.prune_gamma=0.5 strategy.weighting=alignment", "compares updates of one shape: leave "),
]
ROBUSTNESS = [
    ("strategy.robust=krum", "strategy.robust=krum needs strategy.malicious"),
    ("strategy.robust=multi_krum", "needs strategy.malicious"),
    ("strategy.robust=trimmed_mean", "needs strategy.malicious"),
    ("strategy.robust=krum strategy.malicious=4", "needs 11 clients in a round, and a round has 10: lower strategy.ma"),
    ("strategy.robust=trimmed_mean strategy.malicious=5", "needs 11 clients in a round, and a round has 10"),
    ("strategy.robust=median clients=2", f"needs 3 clients in a round, and a round has 2: {RAISE}"),
    ("strategy.robust=norm_bound strategy.fraction_train=0.2", "needs 3 clients in a round, and a round has 2"),
    ("strategy.robust=multi_krum strategy.malicious=2 strategy.selected=7", "or lower strategy.selected=7, or raise"),
    ("strategy.robust=median strategy.selected=2", "strategy.selected=2 is for strategy.robust=multi_krum"),
    ("strategy.robust=median strategy.weighting=alignment", "alignment is a defence of its own, it does not go with"),
    ("strategy.robust=median privacy=local", "privacy=local hides them in noise"),
    ("strategy.robust=median strategy.target=task:Mine", "strategy.target=task:Mine decides itself"),
    ("strategy.robust=norm_bound strategy.clip_multiple=0", "strategy.clip_multiple=0 is out of range"),
    *(
        (f"{ROBUST} strategy.aggregation={rule}", f"{rule} {NOT_ROBUST}")
        for rule in ("fedsa", "flora", "fedex", "flexlora", "hetlora")
    ),
]
PRIVACY = [
    (f"{LORA} privacy=central strategy.aggregation=flora", f"strategy.aggregation=flora {MORE}"),
    (f"{FEDSA} privacy=central", f"strategy.aggregation=fedsa {MORE}"),
    ("privacy=central strategy.weighting=num-examples", "num-examples does not: set strategy.weighting=uniform"),
    ("privacy=central strategy.norm_limit=5", "depending on other clients' data: set strategy.norm_limit=null"),
    ("privacy=central strategy.min_replies=2", "could end the run when few are drawn: set strategy.min_replies=1"),
    ("privacy=central strategy.target=mine:Mine", "=mine:Mine averages in a way of its own: leave it out"),
    ("privacy=central evaluate.select=best", "chooses by evaluations, which privacy=central does not protect: set ev"),
    ("privacy=central stopping.metric=loss stopping.patience=1 evaluate.every=1", "protect: set stopping.metric=null"),
    ("privacy=central privacy.delta=0.1", "whole update of one in 10 clients leak: set it far below 1/clients, such"),
    ("privacy=central privacy.count_noise=1", "=1.0 has no effect: set privacy.clipping=adaptive"),
    ("privacy=none privacy.noise=secure", "privacy.noise=secure has no effect with privacy=none: set privacy"),
    ("privacy=local privacy.noise_multiplier=1", "has no effect with privacy=lo"),
    ("privacy.enabled=true", "is now a choice: set privacy=local in place of privacy.enabled=true"),
    ("privacy=full", "privacy=full is not known: choose one of central, local, none"),
    ("privacy=local privacy.epsilon=0", "privacy.epsilon=0 is out of range: it must be more than 0"),
    ("privacy=local privacy.delta=0", "privacy.delta=0 is out of range: it must be more than 0"),
    ("privacy=local privacy.delta=1 clients=1", "in 1 clients leak: set it far below 1/clients, such as 1e-02"),
    (f"privacy=local {LORA} strategy.aggregation=ffa", "got strategy.aggregation=ffa: use one of them, or privacy=c"),
]


@pytest.mark.parametrize(("words", "message"), GENERAL + ADAPTERS + ROBUSTNESS + PRIVACY)
def test_wrong_settings_are_refused_in_one_line(words: str, message: str) -> None:
    assert message in refusal_of(words.split())
