//! bitsandbytes 4-bit folders: what transformers and bitsandbytes load, and what `glmtune train` takes as its base.

use std::path::Path;

use super::Progress;
use crate::checkpoint::Source;
use crate::checkpoint::quantized::write_folder;
use crate::error::Result;
use crate::quant::QuantType;

/// Writes the weights of `source` into the folder `dir`, the four linears of every block in 4 bits, beside configuration,
/// tokenizer and code of the model folder `base`: the bits of `glmtune quantize`. Embedding, head, norms and biases keep their types.
///
/// A linear that `source` has in these very 4 bits goes through unchanged: it is not rounded twice.
///
/// # Errors
/// A weight in other 4 bits, one that is no number or cannot be read; the system refuses to write. `progress` said no.
pub fn write(
    source: &dyn Source,
    base: &Path,
    dir: &Path,
    quant_type: QuantType,
    double_quant: bool,
    progress: &mut Progress,
) -> Result<()> {
    write_folder(source, base, dir, quant_type, double_quant, progress)
}
