//! The importance on the CPU, float32 and bfloat16, block by block of dW's gradient and within a bounded
//! scratch: drop(x) and gy^T exist in parts only, dW not at all.

use tch::{Device, Kind, Tensor};

use super::Input;
use crate::errors::Result;
use crate::kernels::plain::{as_slice, as_slice_mut};
use crate::kernels::score;
use crate::kernels::simd::{Bf16, Element};
use crate::kernels::tokens::{self, Factor};

/// Bytes of one part of drop(x).
const INPUT: i64 = 3 << 20;
/// Rows and columns of a block of the gradient, tokens of one product, at most: in float32 2 MiB, with a
/// product in bfloat16 3 MiB; gy^T takes 2 MiB.
const ROWS: i64 = 512;
const COLUMNS: i64 = 1024;
const TOKENS: i64 = 2048;

/// `sum_ij |(P A)_ij (gy^T x)_ij|`. `None` for a case that is not of this file.
pub fn sum(p: &Tensor, a: &Tensor, gy: &Tensor, input: Input<'_>) -> Result<Option<f64>> {
    let x = input.tensor();
    let empty = [x, gy, a].iter().any(|tensor| tensor.numel() == 0);
    if x.device() != Device::Cpu || p.kind() == Kind::Double || empty {
        return Ok(None);
    }
    let float =
        |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.f_to_kind(Kind::Float)?.f_contiguous()?) };
    let (p, a) = (float(p)?, float(a)?);
    match x.kind() {
        Kind::Float => Blocks::<f32>::new(&p, &a, gy, input)?.sum().map(Some),
        Kind::BFloat16 => Blocks::<Bf16>::new(&p, &a, gy, input)?.sum().map(Some),
        _ => Ok(None),
    }
}

struct Blocks<'a, E> {
    p: &'a [f32],
    a: Factor<'a>,
    gy: Tensor,
    x: Tensor,
    input: Input<'a>,
    /// Rows, columns and tokens of one product.
    sizes: (i64, i64, i64),
    /// Memory for a part of drop(x), of gy^T, of the gradient and of one product.
    scratch: [Tensor; 4],
    element: std::marker::PhantomData<E>,
}

/// `0..length` in parts of `size`, each as (start, length).
fn parts(length: i64, size: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..length).step_by(size as usize).map(move |start| (start, size.min(length - start)))
}

/// The first elements of `memory` as a matrix.
fn matrix(memory: &Tensor, rows: i64, columns: i64) -> Result<Tensor> {
    Ok(memory.f_narrow(0, 0, rows * columns)?.f_view([rows, columns])?)
}

impl<'a, E: Element> Blocks<'a, E> {
    fn new(p: &'a Tensor, a: &'a Tensor, gy: &Tensor, input: Input<'a>) -> Result<Self> {
        let x = input.tensor().f_contiguous()?;
        let gy = gy.f_contiguous()?;
        let (tokens, features) = x.size2()?;
        let out = gy.size()[1];
        let token_part = TOKENS.min(tokens);
        let drawn = matches!(input, Input::Dropped(..));
        let mut columns = COLUMNS.min(features);
        if drawn {
            // At multiples of 128 every random number is drawn once.
            let most = INPUT / (token_part * size_of::<E>() as i64) / 128 * 128;
            columns = columns.min(most.max(128));
        }
        let sizes = (ROWS.min(out), columns, token_part);
        let wide = E::KIND == Kind::Float;
        let summed = wide || token_part < tokens;
        let empty = |needed: bool, elements: i64, kind: Kind| {
            Tensor::f_empty([if needed { elements } else { 0 }], (kind, Device::Cpu))
        };
        let scratch = [
            empty(drawn, token_part * columns, E::KIND)?,
            empty(!wide, sizes.0 * token_part, E::KIND)?,
            empty(summed, sizes.0 * columns, Kind::Float)?,
            empty(!wide, sizes.0 * columns, E::KIND)?,
        ];
        let components = a.size()[0] as usize;
        let (p, a) = (as_slice::<f32>(p), Factor::new(as_slice::<f32>(a), components));
        Ok(Self { p, a, gy, x, input, sizes, scratch, element: std::marker::PhantomData })
    }

    fn sum(&self) -> Result<f64> {
        let (tokens, features) = self.x.size2()?;
        let out = self.gy.size()[1];
        let (row_part, column_part, token_part) = self.sizes;
        let whole = (0, tokens);
        let mut total = 0.0;
        for column in parts(features, column_part) {
            // Where the tokens are one part, it serves for all rows.
            let shared = (token_part == tokens).then(|| self.input(whole, column)).transpose()?;
            for row in parts(out, row_part) {
                let mut gradient = None;
                for token in parts(tokens, token_part) {
                    let x = match &shared {
                        Some(x) => x.shallow_clone(),
                        None => self.input(token, column)?,
                    };
                    gradient =
                        Some(self.add_product(gradient, token, row, &x, token_part < tokens)?);
                }
                if let Some(gradient) = gradient {
                    total += self.scored(&gradient, row, column);
                }
            }
        }
        Ok(total)
    }

    fn scored(&self, gradient: &Tensor, row: (i64, i64), column: (i64, i64)) -> f64 {
        let range = |(start, length): (i64, i64), scale: usize| {
            start as usize * scale..(start + length) as usize * scale
        };
        let (p, columns) = (&self.p[range(row, self.a.rows)], range(column, 1));
        if gradient.kind() == Kind::Float {
            score::sum(as_slice::<f32>(gradient), p, self.a, columns)
        } else {
            score::sum(as_slice::<E>(gradient), p, self.a, columns)
        }
    }

    /// A part of drop(x), (tokens, columns).
    fn input(&self, token: (i64, i64), column: (i64, i64)) -> Result<Tensor> {
        let Input::Dropped(_, stream) = self.input else {
            let rows = self.x.f_narrow(0, token.0, token.1)?;
            return Ok(rows.f_narrow(1, column.0, column.1)?);
        };
        let part = matrix(&self.scratch[0], token.1, column.1)?;
        // SAFETY: the scratch is known to this function only, and what it gave before is not used again.
        let out = unsafe { as_slice_mut::<E>(&part) };
        let features = self.x.size()[1] as usize;
        let (first, start) = (token.0 as usize, column.0 as usize);
        let columns = start..start + column.1 as usize;
        tokens::dropped(as_slice::<E>(&self.x), features, first, columns, stream, out);
        Ok(part)
    }

    /// `gy^T x` for a part of the tokens and of the rows, added to `before`, if there is one.
    fn add_product(
        &self,
        before: Option<Tensor>,
        token: (i64, i64),
        row: (i64, i64),
        x: &Tensor,
        summed: bool,
    ) -> Result<Tensor> {
        let columns = x.size()[1];
        let gy = self.gy.f_narrow(0, token.0, token.1)?;
        if E::KIND == Kind::Float {
            let left = gy.f_narrow(1, row.0, row.1)?.f_tr()?;
            let mut gradient = matrix(&self.scratch[2], row.1, columns)?;
            if before.is_some() {
                let _ = gradient.f_addmm_(&left, x)?;
            } else {
                let _ = left.f_mm_out(&gradient, x)?;
            }
            return Ok(gradient);
        }
        let left = matrix(&self.scratch[1], row.1, token.1)?;
        // SAFETY: as above.
        let to = unsafe { as_slice_mut::<E>(&left) };
        let rows = row.0 as usize..(row.0 + row.1) as usize;
        score::transpose(as_slice::<E>(&gy), self.gy.size()[1] as usize, rows, to);
        let product = matrix(&self.scratch[3], row.1, columns)?;
        let _ = left.f_mm_out(&product, x)?;
        if !summed {
            return Ok(product);
        }
        let mut gradient = matrix(&self.scratch[2], row.1, columns)?;
        if before.is_some() {
            let _ = gradient.f_add_(&product)?;
        } else {
            gradient.f_copy_(&product)?;
        }
        Ok(gradient)
    }
}
