"""What of a record's free object is hashed, whatever its keys are spelled like, and what of it is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from composer_path.conversion.identifiers import MAX_KEYS, OTHER_KEYS, KeyedHashes, count_keys, keys_of_meta
from composer_path.conversion.identifying_keys import kind_of

SECRET = "Miller-Jane-4711"

_IDENTIFYING = """
PatientID patient_id patient.id PATIENT-ID PatientName patientName PatientBirthDate PatientAddress
PatientTelephoneNumbers OtherPatientIDs AccessionNumber accession_no MRN mrn patient_mrn dob DOB date_of_birth
birthDate StudyInstanceUID SeriesInstanceUID SOPInstanceUID FrameOfReferenceUID ContainerIdentifier
SpecimenIdentifier SpecimenUID name Name full_name firstName last_name surname ssn SSN email e-mail
emailAddress phone phone_number address home_address zip StudyDate AcquisitionDateTime ContentDate
ReferringPhysicianName OperatorsName InstitutionName DeviceSerialNumber hospital Patientenname Geburtsdatum
Nachname case_id caseId slide_id SlideID barcode file_name imagePath subject_id insurance_number 00100020
(0010,0010) 0008,0050 patient_initials medicalRecordNumber pathologist admission_date uuid
HumanPerformerName ContentCreatorName VerifyingObserverName InterpretationAuthor ROIInterpreter ResponsiblePerson
OrderEnteredBy signed_by NamesOfIntendedRecipientsOfResults AcquisitionUID FailedSOPInstanceUIDList TrackingUID
ClinicalTrialSubjectID StudyID AdmissionID SlideIdentifier identifier UniqueDeviceIdentifier StationAETitle
PlacerOrderNumberImagingServiceRequest RegionOfResidence x00100020 0x00100010 tag_0010_0030 pt_id ptName pat_nr HN
case_submitter_id submitter_id tcga_id bcr_aliquot_barcode path_number block-no specimenNumber acc_num report_no
svs_path scanId user_id fname geb 姓名 患者ID 病理号 이름 ФИО svnr
"""
IDENTIFYING = [*_IDENTIFYING.split(), "\uff30atientID"]
_KEPT = """
kind grade split options answer stain_name model_name patient_age PatientSex organ site diagnosis score
template regions stage caption question class_name dataset ki67 tumor_type label fold
prompt_id template_id task_id question_no image_number_of_cells SOPClassUID scanner_model specimen_type pathway
"""
KEPT = _KEPT.split()


@pytest.mark.parametrize("key", IDENTIFYING)
def test_a_key_of_an_identifier_is_hashed_at_any_depth(key: str) -> None:
    for value in ({key: SECRET}, {"a": [{"b": {key: [SECRET, {"c": SECRET}]}}]}, {key: {SECRET: SECRET}}):
        assert SECRET not in json.dumps(KeyedHashes(b"k").hash_meta(value))


@pytest.mark.parametrize("key", KEPT)
def test_a_key_of_no_identifier_is_kept(key: str) -> None:
    assert kind_of(key) is None


def test_a_pair_that_names_its_key_by_a_value_is_hashed_by_it() -> None:
    hashed = KeyedHashes(b"k").hash_meta
    entries: list[Any] = [{"name": "PatientName", "value": SECRET}, {"name": "grade", "value": 2}]
    found = hashed(entries)
    assert SECRET not in json.dumps(found) and found[0]["name"] == "PatientName"
    assert hashed({"tag": "00100010", "vr": "PN", "Value": [SECRET]})["Value"] != [SECRET]


def test_one_patient_has_one_hash_under_every_spelling() -> None:
    hashes = KeyedHashes(b"k")
    found = hashes.hash_meta({"PatientID": "7", "patient": 7, "mrn": "7"})
    assert set(found.values()) == {hashes.hash("patient", "7")}


def test_kept_and_hashed_keys_are_listed_by_name_unless_that_looks_like_a_value() -> None:
    meta = {"kind": 1, "deep": {"grade": [1, {"mrn": 2}], "x": {}}, "Jane Miller": 1, "PatientID": 3, "n": {"a": [1]}}
    kept = {"kind", "x", "(not a plain name)", "a"}
    assert keys_of_meta(meta, hashed=True) == (kept, {"mrn", "PatientID"})
    assert keys_of_meta(meta, hashed=False)[1] == set()


def test_names_of_keys_are_counted_with_a_bound() -> None:
    counts: dict[str, int] = {}
    for number in range(3 * MAX_KEYS):
        count_keys(counts, {f"key{number}", "kind"})
    assert len(counts) == MAX_KEYS + 1 and counts["kind"] == 3 * MAX_KEYS
    assert counts[OTHER_KEYS] == 2 * MAX_KEYS + 1
