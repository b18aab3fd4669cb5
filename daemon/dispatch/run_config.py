"""What a run is told: the settings of its track on the day, within what the track's first run has fixed."""

import structlog

from daemon.settings.model import Settings
from daemon.state.tables import Track
from pipeline.artifacts import NoiseFloor
from pipeline.config import RunConfig

log = structlog.get_logger()


def compose(settings: Settings, track: Track) -> RunConfig:
    """Return the configuration of a run of `track` that begins now. Raises `SettingsError` if it is not declared."""
    own = settings.track(track.name)
    fixed = {
        "metric": own.evaluate.metric if own.evaluate.metric != "auto" else track.metric,
        "max_new_tokens": own.evaluate.max_new_tokens or track.max_new_tokens,
        "batch_size": own.evaluate.batch_size or track.eval_batch_size,
    }
    return RunConfig(
        track=track.name,
        base_model=own.base_model,
        base_model_id=track.base_model_id or "",
        salt=track.salt,
        special_tokens=settings.intake.special_tokens,
        train=own.train,
        gate=own.gate,
        guards=own.guards,
        judge=own.judge,
        price_per_hour=settings.cost.per_hour,
        noise=NoiseFloor.model_validate(track.noise) if track.noise else None,
        split=own.split.model_copy(update=_fixed_shares(track)),
        evaluate=own.evaluate.model_copy(update={key: value for key, value in fixed.items() if value}),
    )


def warn_of_fixed(settings: Settings, track: Track) -> None:
    """Log which shares of the split are set otherwise than the track's first run fixed them: its shares hold."""
    wanted = settings.track(track.name).split
    for name, share in _fixed_shares(track).items():
        if share != getattr(wanted, name):
            log.warning("setting_is_fixed", track=track.name, setting=f"split.{name}", in_force=share)


def _fixed_shares(track: Track) -> dict[str, float]:
    """Return the shares that the track's first run fixed, so that no prompt changes sides."""
    return {name: share for name, share in (track.split or {}).items() if name in {"heldout", "dev"}}
