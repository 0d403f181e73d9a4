//! The definition of every operation on the CPU, generic over f32 and f64.
//!
//! Only [`crate::ops`] calls these functions; it has checked shapes and types before.

pub mod activation;
pub mod attention;
pub mod dora;
mod dot;
pub mod embedding;
pub mod linear;
pub mod loss;
pub mod matrix;
pub mod norm;
pub mod optim;
pub mod optim_8bit;
pub mod panel;
pub mod parallel;
pub mod prefix;
pub mod real;
pub mod rope;
pub mod weight;
