"""The commands with a ResNet-18 of an eighth of the channels: its points are of 3 MB instead of 90, which is what tests of stopping and going on would spend their time on.

python tests/small.py train ...      in tests: the fixture `small_resnet`"""

import sys
from pathlib import Path

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

COMMAND = [sys.executable, str(Path(__file__).resolve())]


class Small(ResNet):
    def __init__(self, weights=None, **kwargs):
        super().__init__(BasicBlock, [2, 2, 2, 2], **kwargs)
        self.fc = nn.Linear(64, 1000)

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def command(*argv):
    "Run a command; its exit status. In tests: `Forked('small:command', 'train', ...)`."
    from streaming_pathology.cli import commands as cli
    from streaming_pathology.cli.parser import hide_main

    torchvision.models.resnet18 = Small
    for program in ('small', 'forks'):
        hide_main(program)  # as the commands themselves do
    return cli.main([str(arg) for arg in argv])


if __name__ == '__main__':
    sys.exit(command(*sys.argv[1:]))
