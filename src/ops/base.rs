//! The product with the weight of the base layer, `x W^T + bias`, and its gradient of x, around which an update
//! is added.

use tch::{Device, Tensor};

use crate::checks;
use crate::errors::Result;
use crate::kernels::plain::widened;
use crate::kernels::tokens;

/// The base layer: its weight (out, in) and bias (out), both of the dtype of x.
pub struct Base<'a> {
    /// W.
    pub weight: &'a Tensor,
    /// Added to every row, where there is one.
    pub bias: Option<&'a Tensor>,
}

/// What y holds when an update is put into it.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    /// Nothing yet: it becomes the bias (out), or zeros, plus the update.
    Bias(Option<&'a Tensor>),
    /// Values that the update is added to.
    Add,
}

impl Start<'_> {
    /// Makes y what the update can be added to.
    pub fn write(self, y: &mut Tensor) -> Result<()> {
        match self {
            Self::Bias(Some(bias)) => y.f_copy_(bias)?,
            Self::Bias(None) => {
                let _ = y.f_zero_()?;
            }
            Self::Add => {}
        }
        Ok(())
    }

    /// The bias as [`Start::of_loops`] wants it.
    pub fn bias(self) -> Result<Option<Vec<f32>>> {
        match self {
            Self::Bias(Some(bias)) => Ok(Some(widened(bias)?)),
            _ => Ok(None),
        }
    }

    /// The same for the loops, with what [`Start::bias`] gave.
    pub fn of_loops(self, bias: Option<&[f32]>) -> tokens::Start<'_> {
        match self {
            Self::Bias(_) => tokens::Start::Bias(bias),
            Self::Add => tokens::Start::Add,
        }
    }
}

impl Base<'_> {
    /// Fails unless it takes an `x` (tokens, in) to (tokens, out).
    pub fn check(&self, x: &Tensor, out: i64) -> Result<()> {
        check_weight(self.weight, x, out)?;
        if let Some(bias) = self.bias {
            checks::kind("bias", bias, x.kind())?;
            checks::shape("bias", bias, &[out])?;
            checks::same_device("bias", bias, "x", x)?;
        }
        Ok(())
    }

    /// `y = x W^T + bias`, whatever y holds.
    pub fn write(&self, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let _ = match self.bias {
            Some(bias) => bias.f_addmm_out(y, x, &self.weight.f_tr()?)?,
            None => x.f_mm_out(y, &self.weight.f_tr()?)?,
        };
        Ok(())
    }

    /// The whole layer, x (..., in) to y (..., out) of `out` features, to which `add` adds an update: it is
    /// given flat x, contiguous, flat y and what that holds.
    pub fn with_update<T>(
        &self,
        x: &Tensor,
        out: i64,
        add: impl FnOnce(&Tensor, &mut Tensor, Start<'_>) -> Result<T>,
    ) -> Result<(Tensor, T)> {
        checks::float("x", x)?;
        let mut shape = x.size();
        let features = shape.pop().unwrap_or_default();
        shape.push(out);
        let x = x.f_reshape([-1, features.max(1)])?.f_contiguous()?;
        self.check(&x, out)?;
        let y = Tensor::f_empty(&shape, (x.kind(), x.device()))?;
        // A view of what is returned: autograd forbids to change a view made inside a function.
        let mut flat = y.f_view([x.size()[0], out])?;
        // On the CPU the update first, into memory that nothing has written yet: the large product reads y to add
        // to it anyway. Elsewhere the product takes the bias along.
        let kept = if x.device() == Device::Cpu {
            let kept = add(&x, &mut flat, Start::Bias(self.bias))?;
            self.add_product(&x, &mut flat)?;
            kept
        } else {
            self.write(&x, &mut flat)?;
            add(&x, &mut flat, Start::Add)?
        };
        Ok((y, kept))
    }

    /// `y += x W^T`: the bias is in y already.
    pub fn add_product(&self, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let _ = y.f_addmm_(x, &self.weight.f_tr()?)?;
        Ok(())
    }
}

/// Fails unless `weight` is (out, in) for an `x` (tokens, in), of its dtype.
pub fn check_weight(weight: &Tensor, x: &Tensor, out: i64) -> Result<()> {
    checks::kind("weight", weight, x.kind())?;
    checks::same_device("weight", weight, "x", x)?;
    checks::shape("weight", weight, &[out, x.size()[1]])
}

/// `grad_x += gy W`, from the gradient of y (tokens, out).
pub fn add_grad_x(weight: &Tensor, gy: &Tensor, grad_x: &mut Tensor) -> Result<()> {
    let _ = grad_x.f_addmm_(gy, weight)?;
    Ok(())
}
