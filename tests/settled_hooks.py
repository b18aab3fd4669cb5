"""The user's commands after a change of champion, run to their end as the daemon's loop does; nothing sleeps."""

from daemon.champions.hooks.changes import Hooks


def settle(hooks: Hooks, now: int) -> None:
    """Let the commands run until there is none to run any more."""
    for _ in range(20):
        hooks.tick(now)
        if not hooks._running and not hooks._rollbacks:
            return
        end_running(hooks)
    message = "the commands come to no end"
    raise AssertionError(message)


def end_running(hooks: Hooks) -> None:
    """Let what runs now come to its end; the daemon has not looked at it yet."""
    for _, _, running in hooks._running.values():
        running.wait()
    for thread in hooks._rollbacks.values():
        thread.join()
