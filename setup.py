"""The package is described in pyproject.toml; this adds the recipes, settings and scripts of examples/ to the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXAMPLES = Path("examples/slimqwen")
PACKAGED = ("recipes", "settings", "demo_teacher", "pretrain_distill.sh", "slurm.sh", "slurm_node.sh")


class BuildWithExamples(build_py):
    """Copies them to megatron_slim/slimqwen; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "megatron_slim" / "slimqwen"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in PACKAGED:
            source = EXAMPLES / name
            if source.is_dir():
                shutil.copytree(source, target / name)
            else:
                shutil.copy2(source, target / name)


setup(cmdclass={"build_py": BuildWithExamples})
