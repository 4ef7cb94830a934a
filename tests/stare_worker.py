"""
Trains STARE on two processes, and notes what the gate of each was told.

Run by test_peers.py under torchrun: `python stare_worker.py MODEL OUTPUT`.
"""

import json
import os
import sys
from pathlib import Path

from support import processes, tiny

from trl_a3po import A3POTrainer, peers


class Stare(A3POTrainer):
    told, rows = (), ()

    def shape_advantages(self, advantages, **batch):
        entropy = peers.logged_entropy(self.state.log_history)
        if self.state.global_step:
            self.told, self.rows = (*self.told, entropy), (*self.rows, *batch["mask"].sum(1).tolist())
        return peers.stare(advantages, entropy_of_last_step=entropy, **batch)


model, output = sys.argv[1], Path(sys.argv[2])
trainer = Stare(model, tiny.parity_reward, tiny.config(output), tiny.prompts(), processing_class=tiny.tokenizer())
trainer.train()
(output / f"told-{os.environ['RANK']}.json").write_text(json.dumps({"told": trainer.told, "rows": trainer.rows}))
processes.leave()
