"""Processes meet before JAX connects them: JAX would wait for a missing one, and then end without saying which.

Process 0 listens at the coordinator's address, where JAX will listen after it. Each other process says its number
there, and is told that all have come, or who has not.
"""

import contextlib
import json
import socket
import time

TRY = 1.0  # seconds between two tries to reach process 0


class Missing(RuntimeError):
    """Not all processes have come, or they do not agree on their numbers."""


def gather(address: str, count: int, number: int, seconds: float) -> None:
    """Returns when all `count` processes have called it, each with its own number. address: HOST:PORT of process 0.

    Raises Missing after `seconds`, and OSError if process 0 cannot listen there."""
    host, _, port = address.rpartition(":")
    if count == 1:
        return
    if not 0 <= number < count or not port.isdigit():
        raise Missing(f"process {number} of {count} at {address}: numbers are 0 to N - 1, and an address is HOST:PORT.")
    end = time.monotonic() + seconds
    if number == 0:
        _expect(int(port), count, end, seconds)
    else:
        _report((host.strip("[]"), int(port)), count, number, end, seconds)


def _expect(port: int, count: int, end: float, seconds: float) -> None:
    here, told = {}, []  # {number: connection}; all connections
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both))
        problem = None
        while len(here) < count - 1 and not problem:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = sorted({*range(1, count)} - {*here})
                what = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
                problem = f"{what} of {count} did not come within {seconds:.0f} seconds."
                break
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger at the port
                connection.settimeout(TRY)
                said = json.loads(connection.recv(1000))
                number, theirs = said["number"], said["count"]
                if theirs != count:
                    problem = f"process {number} counts {theirs} processes, and process 0 counts {count}."
                elif number in here and _open(here[number]):
                    problem = f"two processes have the number {number}."
                here[number] = connection
                told.append(connection)
        for connection in told:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"problem": problem}).encode())
                connection.settimeout(TRY)
                connection.recv(1)  # until they have closed it: the port is then free for JAX
    if problem:
        raise Missing(problem)


def _open(connection: socket.socket) -> bool:
    """Whether the other side still waits: it sends nothing more, and reading ends only when it is gone."""
    connection.settimeout(0.01)
    try:
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def _report(address: tuple[str, int], count: int, number: int, end: float, seconds: float) -> None:
    last = "it did not answer"
    while time.monotonic() < end + TRY:  # process 0 ends first, and says who is missing
        try:
            with socket.create_connection(address, TRY) as connection:
                connection.sendall(json.dumps({"number": number, "count": count}).encode())
                connection.settimeout(max(end + 3 * TRY - time.monotonic(), TRY))
                if answer := connection.recv(10_000):
                    if problem := json.loads(answer)["problem"]:
                        raise Missing(problem)
                    return
        except OSError as error:
            last = str(error)
        except ValueError:
            last = "something else answers there"
        time.sleep(TRY / 2)
    raise Missing(f"process 0 cannot be reached at {address[0]}:{address[1]} within {seconds:.0f} seconds ({last}).")
