//! `VARIANT`s and `SAFEARRAY`s, read and made.

use crate::object;
use crate::types::{Form, MAX_ELEMENTS, Raw};
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ptr;
use vmtide_cim::{CimError, Result};
use windows::Win32::Foundation::VARIANT_BOOL;
use windows::Win32::System::Com::SAFEARRAY;
use windows::Win32::System::Ole::{
    SafeArrayAccessData, SafeArrayCreateVector, SafeArrayDestroy, SafeArrayGetDim,
    SafeArrayGetLBound, SafeArrayGetUBound, SafeArrayGetVartype, SafeArrayUnaccessData,
};
use windows::Win32::System::Variant::{
    VARENUM, VARIANT, VARIANT_0, VARIANT_0_0, VARIANT_0_0_0, VT_ARRAY, VT_BOOL, VT_BSTR, VT_BYREF,
    VT_EMPTY, VT_I1, VT_I2, VT_I4, VT_I8, VT_INT, VT_NULL, VT_R4, VT_R8, VT_UI1, VT_UI2, VT_UI4,
    VT_UI8, VT_UINT, VT_UNKNOWN,
};
use windows::core::{BSTR, IUnknown};

/// `SysAllocStringLen` takes lengths up to this many units with room to spare; longer text is a mistake.
const MAX_UNITS: usize = 64 << 20;

/// A string of COM.
///
/// # Errors
/// [`CimError::Protocol`] for one that no machine should be asked to hold.
pub fn bstr(text: &str) -> Result<BSTR> {
    let units: Vec<u16> = text.encode_utf16().collect();
    if units.len() > MAX_UNITS {
        return Err(CimError::protocol("a parameter", "a text of more than 128 MiB"));
    }
    Ok(BSTR::from_wide(&units))
}

/// A string of COM as text, up to its first zero: texts of management have none, and Wine's are longer than what is in
/// them. What is no Unicode is replaced.
pub fn text(bstr: &BSTR) -> String {
    let end = bstr.iter().position(|unit| *unit == 0).unwrap_or(bstr.len());
    String::from_utf16_lossy(bstr.get(..end).unwrap_or_default())
}

/// What a `VARIANT` holds. `depth` is how deep objects may stand in objects.
///
/// # Errors
/// [`CimError::Protocol`] for types that management does not have.
pub fn read(variant: &VARIANT, depth: usize) -> Result<Raw> {
    // SAFETY: every VARIANT has its type at this place.
    let inner: &VARIANT_0_0 = unsafe { &variant.Anonymous.Anonymous };
    let kind = inner.vt;
    // The member in use is then a pointer to the value, in a place of somebody else's.
    if kind.0 & VT_BYREF.0 != 0 {
        return Err(strange(kind.0));
    }
    if kind.0 & VT_ARRAY.0 != 0 {
        // SAFETY: the type says that this is the member in use; the array lives as long as its VARIANT.
        let array = unsafe { inner.Anonymous.parray };
        return read_array(array, VARENUM(kind.0 & !VT_ARRAY.0), depth);
    }
    let value = &inner.Anonymous;
    // SAFETY: in each branch the type says that this is the member in use.
    unsafe {
        Ok(match kind {
            VT_EMPTY | VT_NULL => Raw::Null,
            VT_I1 => Raw::Integer(value.cVal.into()),
            VT_UI1 => Raw::Integer(value.bVal.into()),
            VT_I2 => Raw::Integer(value.iVal.into()),
            VT_UI2 => Raw::Integer(value.uiVal.into()),
            VT_I4 | VT_INT => Raw::Integer(value.lVal.into()),
            VT_UI4 | VT_UINT => Raw::Integer(value.ulVal.into()),
            VT_I8 => Raw::Integer(value.llVal),
            VT_UI8 => Raw::Unsigned(value.ullVal),
            VT_R4 => Raw::Real(value.fltVal.into()),
            VT_R8 => Raw::Real(value.dblVal),
            VT_BOOL => Raw::Boolean(value.boolVal.0 != 0),
            VT_BSTR => Raw::Text(text(&value.bstrVal)),
            VT_UNKNOWN => object::embedded(value.punkVal.as_ref(), depth)?,
            VARENUM(other) => return Err(strange(other)),
        })
    }
}

fn strange(kind: u16) -> CimError {
    CimError::protocol(crate::error::PEER, format!("a value of the VARIANT type {kind}"))
}

/// The elements of an array while they are looked at.
struct Locked {
    array: *const SAFEARRAY,
    data: *mut c_void,
}

impl Locked {
    fn new(array: *const SAFEARRAY) -> Result<Self> {
        let mut data = ptr::null_mut();
        // SAFETY: the array is a valid one, as its maker said.
        unsafe { SafeArrayAccessData(array, &raw mut data) }.map_err(|error| {
            CimError::protocol(crate::error::PEER, format!("an array: {error}"))
        })?;
        Ok(Self { array, data })
    }

    /// The element at `index`, of a type of the array's width.
    ///
    /// # Safety
    /// The array has more than `index` elements, each a valid `T`.
    unsafe fn element<T>(&self, index: usize) -> &T {
        // SAFETY: said by the caller; the data stays where it is while the array is locked.
        unsafe { &*self.data.cast::<T>().add(index) }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: it was locked once. Nothing can be done where this fails.
        let _ = unsafe { SafeArrayUnaccessData(self.array) };
    }
}

fn read_array(array: *const SAFEARRAY, told: VARENUM, depth: usize) -> Result<Raw> {
    if array.is_null() {
        return Ok(Raw::Null);
    }
    let wrong = |what: &str| CimError::protocol(crate::error::PEER, format!("an array {what}"));
    // SAFETY: the array is not null and belongs to a live VARIANT, here and below.
    if unsafe { SafeArrayGetDim(array) } != 1 {
        return Err(wrong("of more than one dimension"));
    }
    // SAFETY: as above; it has one dimension.
    let bounds = unsafe { (SafeArrayGetLBound(array, 1), SafeArrayGetUBound(array, 1)) };
    let (Ok(lower), Ok(upper)) = bounds else { return Err(wrong("without bounds")) };
    let count = usize::try_from(i64::from(upper) - i64::from(lower) + 1).unwrap_or(0);
    if count > MAX_ELEMENTS {
        return Err(wrong("of more elements than any answer has"));
    }
    // SAFETY: as above. What the array itself says of its elements counts.
    let kind = unsafe { SafeArrayGetVartype(array) }.unwrap_or(told);
    // SAFETY: as above.
    let width = unsafe { (*array).cbElements } as usize;
    let locked = Locked::new(array)?;
    let mut items = Vec::with_capacity(count);
    for index in 0..count {
        // SAFETY: `index` is below the number of elements, whose type is looked at with its width.
        items.push(unsafe {
            match (kind, width) {
                (VT_I1, 1) => Raw::Integer((*locked.element::<i8>(index)).into()),
                (VT_UI1, 1) => Raw::Integer((*locked.element::<u8>(index)).into()),
                (VT_I2, 2) => Raw::Integer((*locked.element::<i16>(index)).into()),
                (VT_UI2, 2) => Raw::Integer((*locked.element::<u16>(index)).into()),
                (VT_I4 | VT_INT, 4) => Raw::Integer((*locked.element::<i32>(index)).into()),
                (VT_UI4 | VT_UINT, 4) => Raw::Integer((*locked.element::<u32>(index)).into()),
                (VT_I8, 8) => Raw::Integer(*locked.element::<i64>(index)),
                (VT_UI8, 8) => Raw::Unsigned(*locked.element::<u64>(index)),
                (VT_R4, 4) => Raw::Real((*locked.element::<f32>(index)).into()),
                (VT_R8, 8) => Raw::Real(*locked.element::<f64>(index)),
                (VT_BOOL, 2) => Raw::Boolean(locked.element::<VARIANT_BOOL>(index).0 != 0),
                (VT_BSTR, 8) => Raw::Text(text(locked.element::<BSTR>(index))),
                (VT_UNKNOWN, 8) => {
                    object::embedded(locked.element::<Option<IUnknown>>(index).as_ref(), depth)?
                }
                (VARENUM(other), _) => return Err(strange(other)),
            }
        });
    }
    Ok(Raw::Array(items))
}

/// A `VARIANT` of this content.
///
/// # Errors
/// [`CimError::Protocol`] for content that does not have this form.
pub fn make(form: Form, raw: &Raw) -> Result<VARIANT> {
    let wrong = || CimError::protocol("a parameter", format!("{raw:?} as {form:?}"));
    Ok(match (form, raw) {
        (_, Raw::Null) => with(VT_NULL, VARIANT_0_0_0::default()),
        (form, Raw::Array(items)) => array(form, items)?,
        (Form::Bool, Raw::Boolean(value)) => VARIANT::from(*value),
        (Form::Bstr, Raw::Text(text)) => VARIANT::from(bstr(text)?),
        (Form::I2, Raw::Integer(value)) => {
            VARIANT::from(i16::try_from(*value).map_err(|_| wrong())?)
        }
        (Form::I4, Raw::Integer(value)) => {
            VARIANT::from(i32::try_from(*value).map_err(|_| wrong())?)
        }
        (Form::Ui1, Raw::Integer(value)) => {
            VARIANT::from(u8::try_from(*value).map_err(|_| wrong())?)
        }
        (Form::R4, Raw::Real(value)) => with(VT_R4, VARIANT_0_0_0 { fltVal: narrowed(*value) }),
        (Form::R8, Raw::Real(value)) => with(VT_R8, VARIANT_0_0_0 { dblVal: *value }),
        _ => return Err(wrong()),
    })
}

#[allow(clippy::cast_possible_truncation, reason = "it was a real32 before it was widened")]
fn narrowed(value: f64) -> f32 {
    value as f32
}

fn with(kind: VARENUM, value: VARIANT_0_0_0) -> VARIANT {
    VARIANT {
        Anonymous: VARIANT_0 {
            Anonymous: ManuallyDrop::new(VARIANT_0_0 {
                vt: kind,
                wReserved1: 0,
                wReserved2: 0,
                wReserved3: 0,
                Anonymous: value,
            }),
        },
    }
}

/// Destroys an array that did not become part of a `VARIANT`.
struct Owned(*mut SAFEARRAY);

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it was made here and belongs to nobody else. Nothing can be done where this fails.
            let _ = unsafe { SafeArrayDestroy(self.0) };
        }
    }
}

fn array(form: Form, items: &[Raw]) -> Result<VARIANT> {
    let wrong =
        || CimError::protocol("a parameter", format!("an array with another than {form:?}"));
    let kind = match form {
        Form::I2 => VT_I2,
        Form::I4 => VT_I4,
        Form::Ui1 => VT_UI1,
        Form::R4 => VT_R4,
        Form::R8 => VT_R8,
        Form::Bool => VT_BOOL,
        Form::Bstr => VT_BSTR,
    };
    let count = u32::try_from(items.len()).map_err(|_| wrong())?;
    // SAFETY: no preconditions; null where there is no memory.
    let mut owned = Owned(unsafe { SafeArrayCreateVector(kind, 0, count) });
    if owned.0.is_null() {
        return Err(CimError::protocol("a parameter", "no memory for its array"));
    }
    let locked = Locked::new(owned.0)?;
    for (index, item) in items.iter().enumerate() {
        // SAFETY: `index` is below the number of elements; each has the type that the array was made for, and is
        // zeros before, so that a string that is overwritten is none.
        unsafe {
            match (form, item) {
                (Form::I2, Raw::Integer(value)) => {
                    let value = i16::try_from(*value).map_err(|_| wrong())?;
                    locked.data.cast::<i16>().add(index).write(value);
                }
                (Form::I4, Raw::Integer(value)) => {
                    let value = i32::try_from(*value).map_err(|_| wrong())?;
                    locked.data.cast::<i32>().add(index).write(value);
                }
                (Form::Ui1, Raw::Integer(value)) => {
                    let value = u8::try_from(*value).map_err(|_| wrong())?;
                    locked.data.cast::<u8>().add(index).write(value);
                }
                (Form::R4, Raw::Real(value)) => {
                    locked.data.cast::<f32>().add(index).write(narrowed(*value));
                }
                (Form::R8, Raw::Real(value)) => locked.data.cast::<f64>().add(index).write(*value),
                (Form::Bool, Raw::Boolean(value)) => {
                    let value = VARIANT_BOOL(if *value { -1 } else { 0 });
                    locked.data.cast::<VARIANT_BOOL>().add(index).write(value);
                }
                // The array owns its strings.
                (Form::Bstr, Raw::Text(text)) => {
                    locked.data.cast::<BSTR>().add(index).write(bstr(text)?);
                }
                _ => return Err(wrong()),
            }
        }
    }
    drop(locked);
    let array = std::mem::replace(&mut owned.0, ptr::null_mut());
    Ok(with(VARENUM(kind.0 | VT_ARRAY.0), VARIANT_0_0_0 { parray: array }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_place_of_somebody_elses_is_not_read() {
        for kind in [VT_BYREF.0 | VT_ARRAY.0 | VT_BSTR.0, VT_BYREF.0 | VT_I4.0] {
            let variant = with(VARENUM(kind), VARIANT_0_0_0 { pparray: ptr::null_mut() });
            assert!(read(&variant, 1).is_err(), "{kind:#x}");
        }
    }
}
