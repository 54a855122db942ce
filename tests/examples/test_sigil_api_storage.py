"""The storage: what it keeps, in which order it gives it back, and that threads may share it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.sigil_api.models import AgentQuery, CreateAgent, StoreMemory
from examples.sigil_api.storage import NameTakenError, Storage
from sigil_policy.testing import FrozenClock


@pytest.fixture
def clock():
    return FrozenClock()


@pytest.fixture
def storage(clock):
    opened = Storage(clock=clock)
    yield opened
    opened.close()


def new(name, stratum="RAI", description="An agent"):
    return CreateAgent(name=name, stratum=stratum, description=description)


def names(storage, **query):
    return [agent.name for agent in storage.agents(AgentQuery(**query))[0]]


def test_a_name_is_taken_once(storage):
    storage.create_agent(new("first"))
    with pytest.raises(NameTakenError):
        storage.create_agent(new("first"))


def test_a_file_keeps_its_agents(tmp_path, clock):
    path = str(tmp_path / "agents.db")
    storage = Storage(path, clock)
    storage.create_agent(new("first"))
    storage.close()
    again = Storage(path, clock)
    assert names(again) == ["first"]
    again.close()


def test_an_operation_that_a_restart_interrupted_has_failed(tmp_path, clock):
    path = str(tmp_path / "agents.db")
    storage = Storage(path, clock)
    operation = storage.start_operation("optimize")
    storage.close()
    again = Storage(path, clock)
    assert again.operation(operation.operation_id).status == "failed"
    again.close()


def test_agents_are_sorted_by_several_fields_and_then_by_age(storage, clock):
    for name, stratum in (("beta", "RTI"), ("alpha", "RAI"), ("gamma", "RAI")):
        storage.create_agent(new(name, stratum))
    assert names(storage) == ["beta", "alpha", "gamma"]
    assert names(storage, sort="stratum,-name") == ["gamma", "alpha", "beta"]
    clock.advance(1)
    storage.create_agent(new("delta"))
    assert names(storage, sort="-created_at,name") == ["delta", "alpha", "beta", "gamma"]


def test_agents_are_filtered(storage):
    storage.create_agent(new("sales_one", "RAI", "Sells"))
    storage.create_agent(new("support", "EEI", "Helps with SALES questions"))
    storage.patch_agent("support", {"status": "inactive"})
    assert names(storage, q="sales") == ["sales_one", "support"]
    assert names(storage, q="%") == []
    assert names(storage, stratum="EEI") == ["support"]
    assert names(storage, status="active") == ["sales_one"]


def test_days_are_utc_midnights_and_ranges_half_open(storage, clock):
    """JS-11, RFC 3339: a date means its midnight in UTC; after is inclusive, before is not."""
    clock.jump(1_767_225_600 - clock.time())  # 2026-01-01T00:00:00Z
    storage.create_agent(new("newyear"))
    clock.advance(86_400)
    storage.create_agent(new("second"))
    assert names(storage, created_after="2026-01-01", created_before="2026-01-02") == ["newyear"]
    assert names(storage, created_after="2026-01-02") == ["second"]
    assert names(storage, created_after="2026-01-02T01:00:00+01:00") == ["second"]
    assert names(storage, created_after="2026-01-02T00:00:00-01:00") == []


def test_a_change_raises_the_version_and_no_change_does_not(storage, clock):
    storage.create_agent(new("first"))
    clock.advance(5)
    same = storage.patch_agent("first", {"stratum": "RAI"})
    assert (same.version, same.updated_at) == ("1.0.0", same.created_at)
    changed = storage.patch_agent("first", {"stratum": "EEI"})
    assert (changed.version, changed.stratum) == ("1.0.1", "EEI")
    assert (changed.updated_at - changed.created_at).total_seconds() == 5
    assert storage.agent("first") == changed
    assert storage.patch_agent("nobody", {"stratum": "EEI"}) is None


def test_deleting_moves_the_time_of_the_collection_forwards(storage, clock):
    storage.create_agent(new("first"))
    before = storage.agents(AgentQuery())[2]
    clock.advance(60)
    assert storage.delete_agent("first")
    assert (storage.agents(AgentQuery())[2] - before).total_seconds() == 60
    assert not storage.delete_agent("first")


def test_a_deleted_agent_takes_its_memories_along(storage):
    storage.create_agent(new("first"))
    kept = storage.remember(StoreMemory(content="of nobody"))
    gone = storage.remember(StoreMemory(content="of first", agent_name="first"))
    storage.delete_agent("first")
    assert storage.memory(gone.memory_id) is None
    assert storage.memory(kept.memory_id) == kept


def test_runs_are_counted(storage, clock):
    storage.create_agent(new("first"))
    clock.advance(7)
    storage.record_run("first")
    status, changed = storage.agent_status("first")
    assert (status.runs, status.last_run_at) == (1, changed)
    assert storage.agent_status("nobody") is None


def test_threads_share_one_storage(storage):
    def work(number):
        storage.create_agent(new(f"agent_{number}"))
        storage.record_run(f"agent_{number}")
        return storage.agent(f"agent_{number}").name

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(work, range(200)))) == 200
    assert storage.agents(AgentQuery())[1] == 200


def test_a_failed_transaction_leaves_nothing_behind(storage):
    def fail():
        with storage._transaction() as run:
            run.execute("DELETE FROM changes")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.agents(AgentQuery())[1] == 0
