//! glmtune fine-tunes ChatGLM-6B at home. `ARCHITECTURE.md` is the map.

// `cargo doc --document-private-items` is how this documentation is read.
#![allow(rustdoc::private_intra_doc_links)]

pub mod adapter;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod compute;
pub mod config;
mod cpu;
pub mod cuda;
pub mod data;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod factor;
pub mod generate;
pub mod model;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod quant;
pub mod report;
pub mod rng;
pub mod schedule;
pub mod tensor;
pub mod tokenizer;
pub mod train;
