"""The queue's bound for each client: nobody takes all of it, whatever addresses he goes by."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest
from pydantic import ValidationError

from opensora.serve.clients import UNKNOWN, client_of
from opensora.serve.config import ServeConfig
from tests.serve.conftest import Paced, client, serving

PROXY = ipaddress.ip_address("10.0.0.1")


@pytest.mark.parametrize(
    ("peer", "forwarded", "proxy", "expected"),
    [
        ("10.0.0.9", [], None, "10.0.0.9"),
        ("10.0.0.9", ["1.1.1.1"], None, "10.0.0.9"),  # anybody can write a header
        ("10.0.0.9", ["1.1.1.1"], PROXY, "10.0.0.9"),
        ("10.0.0.1", ["1.1.1.1"], PROXY, "1.1.1.1"),
        ("10.0.0.1", ["6.6.6.6, 1.1.1.1"], PROXY, "1.1.1.1"),  # the client wrote the first
        ("10.0.0.1", ["6.6.6.6", "7.7.7.7,1.1.1.1"], PROXY, "1.1.1.1"),
        ("10.0.0.1", [], PROXY, "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1, rubbish"], PROXY, "10.0.0.1"),
        ("::ffff:10.0.0.1", ["1.1.1.1"], PROXY, "1.1.1.1"),
        ("2001:db8::1", [], None, "2001:db8::/64"),
        ("2001:db8::ffff:2", [], None, "2001:db8::/64"),
        ("2001:db8:0:1::1", [], None, "2001:db8:0:1::/64"),
        ("::ffff:1.1.1.1", [], None, "1.1.1.1"),
        (None, [], None, UNKNOWN),
        ("a socket's path", ["1.1.1.1"], PROXY, UNKNOWN),
    ],
)
def test_a_client_is_the_address_that_cannot_be_forged(peer, forwarded, proxy, expected):
    assert client_of(peer, forwarded, proxy) == expected


def test_a_proxy_is_an_address():
    assert ServeConfig.model_validate({"proxy": "10.0.0.1"}).proxy == PROXY
    with pytest.raises(ValidationError):
        ServeConfig.model_validate({"proxy": "proxy.example"})


async def ask(service, address, count, **headers):
    """So many requests at once from one address."""
    async with client(service, address=address) as http:
        fields = {"prompt": "a square"}
        sent = [http.post("/v1/videos", json=fields, headers=headers) for _ in range(count)]
        return await asyncio.gather(*sent)


def codes(answers):
    return sorted(a.json()["error"]["code"] for a in answers if a.status_code == 429)


def test_one_client_cannot_take_the_whole_queue(tmp_path):
    with serving(tmp_path, Paced(), started=False, queue=5, queue_per_client=3) as service:
        greedy = asyncio.run(ask(service, "10.0.0.2", 20))
        assert codes(greedy) == ["client_queue_full"] * 17
        refused = next(a for a in greedy if a.status_code == 429)
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) == 10  # nothing is measured: one video's guess
        assert codes(asyncio.run(ask(service, "10.0.0.3", 3))) == ["queue_full"]
        assert service.workers.num_waiting == 5
        assert len(service.store.jobs()) == 5


def test_when_to_come_again_is_when_ones_own_first_job_begins(tmp_path):
    with serving(tmp_path, Paced(), started=False, queue=9, queue_per_client=1) as service:
        for address in ("10.0.0.2", "10.0.0.3", "10.0.0.4"):
            asyncio.run(ask(service, address, 1))
        service.workers.counts.finished["completed"] = 2
        service.workers.counts.seconds = 14.0
        waits = {
            address: int(asyncio.run(ask(service, address, 1))[0].headers["retry-after"])
            for address in ("10.0.0.2", "10.0.0.4")
        }
        assert waits == {"10.0.0.2": 7, "10.0.0.4": 21}


def test_a_place_is_free_again_when_a_job_begins_or_is_cancelled(tmp_path, paced):
    with serving(tmp_path, paced, queue_per_client=1) as service:
        (first,) = asyncio.run(ask(service, "10.0.0.2", 1))
        assert paced.arrived.acquire(timeout=180)
        (second,) = asyncio.run(ask(service, "10.0.0.2", 1))
        assert [first.status_code, second.status_code] == [200, 200]
        assert codes(asyncio.run(ask(service, "10.0.0.2", 1))) == ["client_queue_full"]
        service.workers.remove(second.json()["id"])
        assert codes(asyncio.run(ask(service, "10.0.0.2", 1))) == []


def test_behind_a_proxy_clients_are_told_apart_where_it_is_named(tmp_path):
    for proxy, expected in ((None, ["client_queue_full"]), (PROXY, [])):
        settings = {"queue_per_client": 1, "proxy": proxy}
        with serving(tmp_path / str(proxy), Paced(), started=False, **settings) as service:
            answers = []
            for address in ("1.1.1.1", "2.2.2.2"):
                header = {"x-forwarded-for": f"9.9.9.9, {address}"}
                answers += asyncio.run(ask(service, str(PROXY), 1, **header))
            assert codes(answers) == expected


def test_jobs_that_a_restart_found_count_for_nobody(tmp_path):
    for _ in range(2):
        with serving(tmp_path, Paced(), started=False, queue_per_client=1) as service:
            assert codes(asyncio.run(ask(service, "10.0.0.2", 1))) == []
    assert len(service.store.jobs()) == 2
    assert b"10.0.0.2" not in b"".join(p.read_bytes() for p in tmp_path.rglob("job.json"))


def test_without_the_setting_one_client_may_fill_the_queue(tmp_path):
    with serving(tmp_path, Paced(), started=False, queue=4) as service:
        assert codes(asyncio.run(ask(service, "10.0.0.2", 5))) == ["queue_full"]
