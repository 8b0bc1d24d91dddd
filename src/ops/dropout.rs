//! The dropout of an op's input, `drop(x)`: which elements stay, drawn or kept, and by how much the rest grows.

use tch::{Device, Kind, Tensor};

use crate::checks;
use crate::errors::{Error, Result};
use crate::kernels::cuda;
use crate::kernels::dropout::{self, Stream};
use crate::kernels::tokens;

/// The dropout of one call. The mask is a function of `seed`: the CPU draws it anew where it is needed,
/// the kernels of a CUDA device keep it, a bit an element. Where there are no such kernels it comes from
/// torch's generator and is kept, a byte an element.
pub struct Dropout {
    pub(super) stream: Stream,
    /// The mask, if it is kept, or given.
    pub mask: Option<Tensor>,
    /// Probability with which an element is kept.
    pub keep: f64,
    packed: bool,
    queue: cuda::Stream,
}

impl Dropout {
    /// For a tensor like `x`, dropout probability `p`, and the mask that the forward used, if it was kept.
    /// `None` where nothing is dropped.
    pub fn of(
        x: &Tensor,
        p: f64,
        seed: u64,
        mask: Option<Tensor>,
        queue: cuda::Stream,
    ) -> Result<Option<Self>> {
        checks::probability("p", p)?;
        if p == 0.0 {
            return Ok(None);
        }
        let stream = Stream::new(p, seed, 0);
        let packed = x.device() == Device::Cpu || cuda::takes(x, queue);
        let keep = if packed { stream.keep_probability() } else { 1.0 - p };
        Ok(Some(Self { stream, mask, keep, packed, queue }))
    }

    /// Is the mask of `x` drawn by the loops of the CPU wherever it is needed?
    pub(super) fn is_drawn_anew(&self, x: &Tensor) -> bool {
        self.mask.is_none() && x.device() == Device::Cpu && !cuda::takes(x, self.queue)
    }

    /// Draws what has to be kept until the backward pass, if it is not there yet.
    pub(super) fn prepare(&mut self, x: &Tensor) -> Result<()> {
        if self.mask.is_none() && self.packed {
            self.mask = cuda::draw_mask(x, &self.stream, self.queue)?;
        } else if self.mask.is_none() {
            let mut mask = Tensor::f_empty(x.size(), (Kind::Uint8, x.device()))?;
            let _ = mask.f_bernoulli_float_(self.keep)?;
            self.mask = Some(mask);
        }
        Ok(())
    }

    /// The mask for `x`, checked.
    pub(super) fn mask_for(&self, x: &Tensor) -> Result<Tensor> {
        let Some(mask) = &self.mask else {
            if x.device() == Device::Cpu {
                return dropout::draw(x.numel(), &self.stream);
            }
            return Err(Error::Value("mask is None; give the one of the forward".into()));
        };
        checks::kind("mask", mask, Kind::Uint8)?;
        checks::same_device("mask", mask, "x", x)?;
        if !mask.is_contiguous() {
            return Err(Error::Value("mask is not contiguous; give the one of the forward".into()));
        }
        let packed = [(x.numel() as i64 + 7) / 8];
        let shape = if self.packed { packed.to_vec() } else { x.size() };
        checks::shape("mask", mask, &shape)?;
        Ok(mask.shallow_clone())
    }

    /// Zeroes what is dropped. The division by `keep` is left to the caller, who folds it into a
    /// smaller factor.
    pub(super) fn zero_(&self, values: &mut Tensor, mask: &Tensor) -> Result<()> {
        if let Some(zeroed) = cuda::apply_mask(values, mask, self.queue)? {
            return Ok(values.f_copy_(&zeroed)?);
        }
        if self.packed {
            return dropout::zero_(values, mask);
        }
        let _ = values.f_mul_(mask)?;
        Ok(())
    }

    /// `x` with zeros where it is dropped, contiguous.
    pub(super) fn applied(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        if let Some(dropped) = cuda::apply_mask(x, mask, self.queue)? {
            return Ok(dropped);
        }
        if self.packed {
            return dropout::applied(x, mask);
        }
        Ok(x.f_mul(mask)?.f_contiguous()?)
    }

    /// `drop(x)` without the gain, in a forward pass, which draws the mask.
    pub(super) fn drop(dropout: Option<&mut Self>, x: &Tensor) -> Result<Tensor> {
        let Some(dropout) = dropout else { return Ok(x.shallow_clone()) };
        dropout.prepare(x)?;
        Self::drop_again(Some(dropout), x)
    }

    /// The same in a backward pass.
    pub(super) fn drop_again(dropout: Option<&Self>, x: &Tensor) -> Result<Tensor> {
        let Some(dropout) = dropout else { return Ok(x.shallow_clone()) };
        // Drawn on the way, in one pass, where it is drawn by the CPU.
        let drawn =
            if dropout.mask.is_none() { tokens::drop_all(x, &dropout.stream)? } else { None };
        match drawn {
            Some(dropped) => Ok(dropped),
            None => dropout.applied(x, &dropout.mask_for(x)?),
        }
    }

    /// Zeroes of a gradient of x, contiguous, what was dropped.
    pub(super) fn zero_gradient_(dropout: Option<&Self>, grad_x: &mut Tensor) -> Result<()> {
        match dropout {
            Some(dropout) => dropout.zero_(grad_x, &dropout.mask_for(grad_x)?),
            None => Ok(()),
        }
    }

    pub(super) fn gain(dropout: Option<&Self>) -> f64 {
        match dropout {
            Some(dropout) if dropout.keep > 0.0 => 1.0 / dropout.keep,
            _ => 1.0,
        }
    }
}

/// The mask of `elements` elements as the CPU draws it, packed: uint8 of ceil(elements / 8). `offset` is the
/// first counter of the generator.
pub fn mask(elements: usize, p: f64, seed: u64, offset: u64) -> Result<Tensor> {
    checks::probability("p", p)?;
    dropout::draw(elements, &Stream::new(p, seed, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_that_keeps_nothing_divides_by_nothing() {
        let x = Tensor::from_slice(&[1.0]);
        let dropout = Dropout::of(&x, 1.0, 0, None, cuda::Stream(0)).unwrap();
        assert_eq!(Dropout::gain(dropout.as_ref()), 1.0);
    }
}
