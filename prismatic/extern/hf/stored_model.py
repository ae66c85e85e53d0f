"""Loading and saving a model by transformers' own calls, with what the published layout keeps beside the weights."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.original import original_config
from prismatic.libraries import PreTrainedModel
from prismatic.models.film import has_film, merge_published_state, split_state
from prismatic.stored_files import component_file, component_files, component_name, load_component, make_readable


class StoredModel(PreTrainedModel):
    """A model with a `vision_backbone`, which FiLM may modulate: its FiLM is a component of its own on the disk."""

    config: OpenVLAConfig
    vision_backbone: Any

    def enable_film(self) -> None:
        """Give the vision backbone its FiLM, where it has none."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers loads a model, and FiLM from the component beside the weights, where there is one.

        Beside transformers' own options all settings of `config.json` may be given; `pruner` and `robot` by name too.
        A local folder that looks like an original OpenVLA checkpoint acts as one, where `config` does not say how it
        acts; a hub id shows too few of its files to tell.

        Raises:
            TypeError: listing the settings, for an option that is none.
            ValueError: for a setting that is none of its choices, a damaged weight file, and FiLM that is recorded and
                not there.
        """
        path = Path(pretrained_model_name_or_path).expanduser()
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        if path.is_dir():
            folder = path
            if (original := original_config(folder, kwargs.get("config"))) is not None:
                settings = [key for key in kwargs if key in OpenVLAConfig.__annotations__]
                original.update({key: kwargs.pop(key) for key in settings})
                kwargs["config"] = original
        else:  # transformers fetches none of the components
            film_only = component_name("vision_backbone")
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=film_only, **hub))
        film = component_file(folder, "vision_backbone")
        place = str(path) if path.is_dir() else pretrained_model_name_or_path
        try:
            loaded = super().from_pretrained(place, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"{place}: a weight file is cut off or no safetensors file ({error}); copy or download it again "
                "(lightvla inspect says which)"
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if film is None and model.config.use_film:
            raise ValueError(f"{folder} records FiLM, but has no vision_backbone--*_checkpoint.pt; copy it there")
        model.config.use_film = film is not None
        if film is not None:
            model.load_film(film)
        if model.config.action_head is None and component_file(folder, "action_head") is not None:
            noisy = component_file(folder, "noisy_action_projector")
            model.config.action_head = "l1" if noisy is None else "diffusion"
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """As transformers saves a model; FiLM goes into a component beside the weights, as published."""
        state = kwargs.pop("state_dict", None) or self.state_dict()
        component: dict[str, torch.Tensor] = {}
        if has_film(self.vision_backbone):
            state, component = split_state(state)
        super().save_pretrained(save_directory, state_dict=state, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        make_readable(Path(save_directory), Path(save_directory).glob("model*.safetensors"))
        for old in component_files(Path(save_directory), "vision_backbone"):
            old.unlink()
        if component:
            parts = {name: value.detach().cpu() for name, value in component.items()}
            torch.save(parts, Path(save_directory) / component_name("vision_backbone", "latest"))

    def load_film(self, file: Path) -> None:
        """Put a FiLM component in the place of the whole vision backbone. Raises ValueError where it does not fit."""
        self.enable_film()
        self.vision_backbone.load_state_dict(self.film_state(file))

    def film_state(self, file: Path) -> dict[str, torch.Tensor]:
        """What a component holds for the vision backbone, which has FiLM. Raises ValueError where it does not fit."""
        state = merge_published_state(load_component(file))
        expected = {name: value.shape for name, value in self.vision_backbone.state_dict().items()}
        if odd := sorted(
            name for name in {*expected, *state} if expected.get(name) != getattr(state.get(name), "shape", 0)
        ):
            raise ValueError(f"{file} does not fit the vision backbone that config.json describes, e.g. {odd[0]!r}")
        return state
