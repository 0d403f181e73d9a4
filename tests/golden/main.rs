//! Is it ChatGLM, bitsandbytes, PEFT, SentencePiece? Reads any folder with the layout of the golden set
//! (`GLMTUNE_GOLDENS`, default the small set in `tests/goldens`) through its manifest; dimensions, vocabularies and
//! prompts come from the files.

mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
mod forward;
mod generation;
mod gradients;
mod merged;
mod metrics;
mod nf4;
mod optimizers;
mod peft;
mod schedules;
mod tokenizer;
mod trajectories;
mod tuned;
