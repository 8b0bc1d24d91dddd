//! What happens between the backward pass and the optimizer's update, for all modules in one call:
//! the smoothing of the importances and the gradient of the regulariser.

use tch::{Kind, Tensor};

use crate::checks;
use crate::errors::Result;
use crate::kernels::cuda;
use crate::policies::{orthogonality, smoothing};

/// The vectors of the smoothing, float64, a slot a module; see [`smoothing::smooth_`].
pub struct Smoothing {
    /// What the backward passes of the step have added up.
    pub importance: Tensor,
    /// What each module's importance is multiplied by.
    pub norm: Tensor,
    /// The smoothed importances.
    pub mean: Tensor,
    /// Their uncertainties.
    pub uncertainty: Tensor,
    /// Decay of `mean`.
    pub beta1: f64,
    /// Decay of `uncertainty`.
    pub beta2: f64,
}

/// What a loss scaler has to say about a step.
pub struct Scale {
    /// The scale of the loss, where the optimizer does not know it.
    pub loss: Option<f64>,
    /// The scale of loss and gradients, where the optimizer divides the gradients by it itself.
    pub gradients: Option<Tensor>,
    /// Above 0 where gradients overflowed, and the optimizer is to do nothing.
    pub overflow: Option<Tensor>,
}

/// The parameters and vectors of all modules, for every step.
pub struct Plan {
    a: Vec<Tensor>,
    b: Vec<Tensor>,
    smoothing: Smoothing,
}

impl Plan {
    /// `a` and `b` hold leaves, (rows, in) and (out, rows), one of each a module; they may change
    /// their size in place.
    pub fn new(a: Vec<Tensor>, b: Vec<Tensor>, smoothing: Smoothing) -> Result<Self> {
        let modules = checks::vector("importance", &smoothing.importance)?;
        checks::one_each("a", &a, modules as usize)?;
        checks::one_each("b", &b, modules as usize)?;
        orthogonality::check("a", &a)?;
        orthogonality::check("b", &b)?;
        let Smoothing { importance, norm, mean, uncertainty, beta1, beta2 } = &smoothing;
        smoothing::check(importance, norm, mean, uncertainty, *beta1, *beta2)?;
        Ok(Self { a, b, smoothing })
    }

    /// With `smooth`, takes the step's importances into the smoothing and sets them to 0; with a
    /// `weight` other than 0, adds `weight` times the regulariser's gradient to the leaves' own.
    /// Kernels for a CUDA device are queued on `queue`.
    pub fn take_gradients_(
        &mut self,
        smooth: bool,
        weight: f64,
        scale: &Scale,
        queue: cuda::Stream,
    ) -> Result<()> {
        checks::finite("weight", weight)?;
        for (name, tensor) in [("grad_scale", &scale.gradients), ("found_inf", &scale.overflow)] {
            if let Some(tensor) = tensor {
                checks::one_number(name, tensor)?;
            }
        }
        if smooth {
            self.smooth(scale, queue)?;
        }
        if weight == 0.0 {
            return Ok(());
        }
        // Made where it is used: nothing waits for a copy.
        let options = (Kind::Double, self.a[0].device());
        let mut factor = Tensor::f_full([0_i64; 0], weight, options)?;
        if let Some(scale) = &scale.gradients {
            factor = scale.f_reshape([0_i64; 0])?.f_to_kind(Kind::Double)?.f_mul_scalar(weight)?;
        }
        orthogonality::add_to_leaves_(&self.a, &self.b, &factor, queue)
    }

    fn smooth(&mut self, scale: &Scale, queue: cuda::Stream) -> Result<()> {
        let Smoothing { importance, norm, mean, uncertainty, beta1, beta2 } = &mut self.smoothing;
        let like = |tensor: &Tensor| -> Result<Tensor> {
            Ok(tensor.f_reshape([0_i64; 0])?.f_to_kind(Kind::Double)?.f_to_device(norm.device())?)
        };
        let mut factor = norm.shallow_clone();
        if let Some(scale) = &scale.gradients {
            factor = factor.f_div(&like(scale)?)?;
        } else if let Some(scale) = scale.loss {
            factor = factor.f_div_scalar(scale)?;
        }
        if let Some(overflow) = &scale.overflow {
            // The smoothing leaves out a step that is not finite.
            factor = factor.f_masked_fill(&like(overflow)?.f_gt(0.0)?, f64::NAN)?;
        }
        smoothing::smooth_(importance, &factor, mean, uncertainty, *beta1, *beta2, queue)?;
        let _ = importance.f_zero_()?;
        Ok(())
    }

    /// The value of the regulariser, a float64 scalar tensor.
    pub fn orthogonality(&self) -> Result<Tensor> {
        orthogonality::value(&self.a, &self.b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    const NOTHING: Scale = Scale { loss: None, gradients: None, overflow: None };

    fn plan(a: &[Tensor], b: &[Tensor]) -> Plan {
        let vector =
            |value: f64| Tensor::full([a.len() as i64], value, (Kind::Double, Device::Cpu));
        let smoothing = Smoothing {
            importance: vector(8.0),
            norm: vector(0.5),
            mean: vector(2.0),
            uncertainty: vector(1.0),
            beta1: 0.5,
            beta2: 0.75,
        };
        let clones = |tensors: &[Tensor]| tensors.iter().map(Tensor::shallow_clone).collect();
        Plan::new(clones(a), clones(b), smoothing).unwrap()
    }

    fn leaf(values: &[f64], size: [i64; 2], grad: f64) -> Tensor {
        let leaf = Tensor::from_slice(values).reshape(size).set_requires_grad(true);
        (&leaf * grad).sum(Kind::Double).backward();
        leaf
    }

    fn modules() -> ([Tensor; 1], [Tensor; 1]) {
        ([leaf(&[2.0, 0.0], [1, 2], 1.0)], [leaf(&[1.0, 0.0], [2, 1], 1.0)])
    }

    #[test]
    fn importances_are_taken_in_and_reset() {
        let (a, b) = modules();
        let mut plan = plan(&a, &b);
        let scale = Scale { loss: Some(2.0), ..NOTHING };
        plan.take_gradients_(true, 0.0, &scale, cuda::Stream(0)).unwrap();
        // 0.5 * 2 + 0.5 * (8 * 0.5 / 2), then 0.75 * 1 + 0.25 * 0.
        assert_eq!(plan.smoothing.mean, Tensor::from_slice(&[2.0]));
        assert_eq!(plan.smoothing.uncertainty, Tensor::from_slice(&[0.75]));
        assert_eq!(plan.smoothing.importance, Tensor::from_slice(&[0.0]));
        assert_eq!(a[0].grad(), Tensor::from_slice(&[1.0, 1.0]).reshape([1, 2]));
    }

    #[test]
    fn an_overflowed_step_is_left_out() {
        let (a, b) = modules();
        let mut plan = plan(&a, &b);
        let scale = Scale { overflow: Some(Tensor::from_slice(&[1.0f32])), ..NOTHING };
        plan.take_gradients_(true, 0.0, &scale, cuda::Stream(0)).unwrap();
        assert_eq!(plan.smoothing.mean, Tensor::from_slice(&[2.0]));
        assert_eq!(plan.smoothing.importance, Tensor::from_slice(&[0.0]));
    }

    #[test]
    fn the_leaves_own_gradients_grow_by_the_scaled_regulariser() {
        let (a, b) = modules();
        let scale = Scale { gradients: Some(Tensor::from_slice(&[4.0f32])), ..NOTHING };
        plan(&a, &b).take_gradients_(false, 0.125, &scale, cuda::Stream(0)).unwrap();
        // 0.125 * 4 * 2 * 3 * A / (2 * 3)
        assert_eq!(a[0].grad(), Tensor::from_slice(&[2.0, 1.0]).reshape([1, 2]));
        assert_eq!(b[0].grad(), Tensor::from_slice(&[1.0, 1.0]).reshape([2, 1]));
    }
}
