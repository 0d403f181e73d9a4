//! How good is a model? Losses, answers compared with references, classification, and what it forgot.
//!
//! Pure functions of a model and samples; the training loop and `glmtune eval` call the same ones.

pub mod answers;
pub mod classes;
pub mod forgetting;
pub mod loss;
pub mod text;
mod words;

pub use answers::{AnswerOptions, Prediction, Question, TextMetrics, answer};
pub use classes::{Candidates, Classification, labels_of};
pub use forgetting::{Forgetting, ProbeOptions, Reference, probe_extents};
pub use loss::{LossMetrics, loss};
pub use text::{TextScores, score};
