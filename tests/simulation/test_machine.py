"""The same promises as a state machine: hypothesis looks for a short story that breaks them, and tells the shortest."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from tests.support.chain_engine import NAN_TOKEN
from tests.support.reference import Reference
from tests.support.stage import Stage
from tx_async.errors import Conflict

SIZES = st.lists(st.integers(2, 9), min_size=1, max_size=3)
NAMES = st.sampled_from("ab")


class TrainingRuns(RuleBasedStateMachine):
    """Clients of up to four runs; a server and a worker that may die after any event."""

    models = Bundle("models")

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()
        #: submissions that were held back: model, seq_id
        self.held: list[tuple[str, int]] = []

    # ---- clients

    @precondition(lambda self: len(self.stage.models) < 4)
    @rule(target=models)
    def create(self):
        model = self.stage.model()
        self.stage.next_seq_id[model] = 1
        return model

    @rule(
        model=models,
        sizes=st.lists(st.integers(2, 9), min_size=1, max_size=3),
        nan=st.sampled_from([False] * 9 + [True]),
    )
    def forward_backward(self, model: str, sizes: list[int], nan: bool):
        seq_id = self.stage._take_seq_id(model)
        self.stage.forward_backward(model, seq_id, tuple(sizes), token=NAN_TOKEN if nan else seq_id % 80)

    @rule(model=models)
    def optim_step(self, model: str):
        self.stage.optim_step(model, self.stage._take_seq_id(model))

    @rule(model=models, name=NAMES, overwrite=st.booleans())
    def save(self, model: str, name: str, overwrite: bool):
        self.stage.save(model, self.stage._take_seq_id(model), name, overwrite=overwrite)

    @rule(model=models, name=NAMES, optimizer=st.booleans())
    def load(self, model: str, name: str, optimizer: bool):
        self.stage.load(model, self.stage._take_seq_id(model), f"tinker://{model}/weights/{name}", optimizer)

    @rule(model=models)
    def hold_back(self, model: str):
        """This seq_id arrives later, too late, or never."""
        self.held.append((model, self.stage._take_seq_id(model)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def arrive_late(self, data: st.DataObject):
        model, seq_id = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        try:
            self.stage.optim_step(model, seq_id)
        except Conflict:
            del self.stage.operations[model, seq_id]

    @rule(data=st.data())
    def submit_again(self, data: st.DataObject):
        if self.stage.acknowledged:
            accepted = self.stage.acknowledged[data.draw(st.sampled_from(sorted(self.stage.acknowledged)))]
            assert self.stage.submit_now(accepted.operation) == accepted.request.request_id

    @rule(num_samples=st.integers(1, 3))
    def sample(self, num_samples: int):
        paths = sorted(self.stage.catalog.checkpoints)
        self.stage.ask(self.stage.sampler(path=paths[0] if paths else None), num_samples=num_samples)

    # ---- what the world does

    @rule(events=st.integers(1, 6))
    def go_on(self, events: int):
        for _ in range(events):
            self.stage.step()

    @rule()
    def kill_the_worker(self):
        self.stage.crash_worker()
        self.stage.start_worker()

    @rule()
    def kill_the_server(self):
        self.stage.crash_server()
        self.stage.start_worker()

    @rule(seconds=st.sampled_from([1.0, 25.0, 70.0]))
    def wait(self, seconds: float):
        self.stage.wait(seconds)

    @rule()
    def damage(self):
        self.stage.damage_a_snapshot()

    @invariant()
    def everything_acknowledged_is_there(self):
        for request_id in self.stage.acknowledged:
            self.stage._look(request_id)

    def teardown(self):
        self.stage.quiesce()
        self.stage.tidy()
        Reference(self.stage).check()


TestTrainingRuns = TrainingRuns.TestCase
TestTrainingRuns.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
