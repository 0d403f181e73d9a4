//! Which parameters go together: weight decay, learning rate, and gradient norms by layer.

use crate::tensor::Shape;

/// Does the Hugging Face Trainer decay this parameter? Everything but biases and the parameters of LayerNorms;
/// LoRA's A and B and DoRA's magnitudes are decayed.
pub fn is_decayed(name: &str) -> bool {
    !(name.ends_with(".bias") || name.ends_with("layernorm.weight"))
}

/// Does LoRA+ (Hayou et al. 2024, arXiv 2402.12354) raise the learning rate of this parameter? As PEFT's
/// `create_loraplus_optimizer`: LoRA's B and everything of one dimension (DoRA's magnitudes, biases, LayerNorms); not A,
/// and not a whole embedding or head that trains beside LoRA.
pub fn is_raised_by_loraplus(name: &str, shape: Shape) -> bool {
    name.contains("lora_B") || shape.extents().len() == 1
}

/// Does bitsandbytes keep 32-bit state for this parameter? Those of less than 4096 elements (its `min_8bit_size`), and
/// the tables of embeddings, as `transformers.Trainer` asks of it: the rows of tokens that a batch lacks have a gradient of 0, and a
/// second moment that 8 bits rounded to 0 would leave their first moment divided by epsilon.
pub(super) fn keeps_32_bits(name: &str, elements: usize) -> bool {
    let embedding = [
        "word_embeddings.",
        "position_embeddings.",
        "prefix_encoder.embedding.",
    ];
    elements < 4096 || embedding.iter().any(|module| name.contains(module))
}

/// The part of the model that a parameter belongs to: `layers.3`, `embedding`, `head`, `prefix`, `final_layernorm`, or
/// `other`.
pub fn group_of(name: &str) -> String {
    let mut parts = name.split('.');
    while let Some(part) = parts.next() {
        match part {
            "layers" => {
                if let Some(number) = parts.next().filter(|n| n.parse::<usize>().is_ok()) {
                    return format!("layers.{number}");
                }
            }
            "word_embeddings" => return "embedding".into(),
            "lm_head" => return "head".into(),
            "prefix_encoder" => return "prefix".into(),
            "final_layernorm" => return "final_layernorm".into(),
            _ => {}
        }
    }
    "other".into()
}
