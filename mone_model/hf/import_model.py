"""Print the options of our model for a Hugging Face folder, a run or a checkpoint; or say why it cannot be expressed.

    mone-import source=models/qwen output=imported/model/qwen.yaml
    mone-pretrain --config-dir imported model=qwen init.source=models/qwen 'data.blend=[{path: data/mine}]'

The data is tokenized with the tokenizer of the model. The command reads the configuration and the headers of the weights
only. Training reads the weights (`init.source`).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from mone_common.console import UserError, command, to_dataclass
from mone_common.files import writing
from mone_model.accounting import count_parameters
from mone_model.hf.imported_model import ImportedModel, find_model


@dataclass
class ImportConfig:
    """Options of mone-import."""

    source: str = MISSING
    """Folder of a Hugging Face model, a run or a checkpoint."""
    step: int | None = None
    """Step of the checkpoint, if the source is a run; null: the newest."""
    output: str | None = None
    """File to write, FOLDER/model/NAME.yaml, for `mone-pretrain --config-dir FOLDER model=NAME`; null: print the options."""

    def __post_init__(self) -> None:
        if self.output is None:
            return
        path = Path(self.output)
        if path.suffix != ".yaml" or path.absolute().parent.name != "model":
            raise UserError(
                f"output={path}: must be FOLDER/model/NAME.yaml, where `--config-dir FOLDER model=NAME` finds it"
            )
        if path.exists():
            raise UserError(f"output={path}: exists; give another name, or remove it")


ConfigStore.instance().store(name="import_schema", node=ImportConfig)


@command("import")
def main(hydra_config: DictConfig) -> None:
    """Print or write the options of the model."""
    options = to_dataclass(hydra_config, ImportConfig)
    try:
        imported = find_model(Path(options.source), step=options.step)
    except UserError as error:
        raise UserError(f"source={error}") from error
    text = yaml_of(imported)
    if options.output is None:
        print(text, end="")
        return
    output = Path(options.output)
    try:
        with writing(output) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written ({error.strerror})") from error
    print(f"written: {output}")
    print(
        f"train with: mone-pretrain --config-dir {output.parent.parent} model={output.stem} init.source={options.source} ..."
    )


def yaml_of(imported: ImportedModel) -> str:
    """The model section as a choice of the group `model`."""
    parameters = count_parameters(imported.model)
    sizes = f"{parameters.total / 1e6:.1f}M parameters, {parameters.active / 1e6:.1f}M active"
    options = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(imported.model)))
    return f"# {imported.path} ({imported.format}): {sizes}.\n{options}"


if __name__ == "__main__":
    main()
